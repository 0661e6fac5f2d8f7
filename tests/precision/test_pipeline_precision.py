"""A whole image model with rounded weights: every component proven, and what it does to masks in the manifest."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from torch import nn

from sam3x.cli.pipeline_views import pipeline_view
from sam3x.errors import VerificationError
from sam3x.pipeline import export_pipeline, module_image_source, verify_pipeline
from sam3x.pipeline.job import ComponentJob
from sam3x.pipeline.quality import TOP, eager_answers, iou, quality_of
from sam3x.pipeline.request import resolve_pipeline
from sam3x.runtime import Segmenter
from sam3x.runtime.manifest import SEGMENTER, load_manifest
from sam3x.sources.names import COMPONENTS
from sam3x.targets.onnx import weights as onnx_weights
from sam3x.targets.onnx.target import OnnxTarget
from support.folders import MadeOnce
from support.image_model import photograph, taken_from


@pytest.fixture(scope="module")
def folder(tiny_model: nn.Module, tiny_vocabulary: Path, made_once: MadeOnce) -> Path:
    def write(folder: Path) -> None:
        export_pipeline(module_image_source(tiny_model), output=folder, tokenizer=tiny_vocabulary, weights="int8")

    return made_once("int8_pipeline", write)  # at its end tiny_model says whether the export changed it


@pytest.mark.long
def test_every_component_equals_eager_with_its_weights_rounded(folder: Path) -> None:
    manifest = load_manifest(folder)
    assert manifest.verified and tuple(item.name for item in manifest.components) == COMPONENTS
    for item in manifest.components:
        assert item.metadata["narrow_tensors"] >= 8, item.name
        floats = [record for record in item.verification if record.rms_rel is not None]
        assert all(record.passed and record.max_rel < 2e-5 for record in item.verification), item.name
        assert max(record.rms_rel or 0 for record in floats) > 1e-3  # and is not eager as it was
        assert all(record.rms_rel == pytest.approx(record.eager_rms_rel, rel=0.05, abs=1e-6) for record in floats)


@pytest.mark.long
def test_the_manifest_tells_what_it_does_to_masks(folder: Path) -> None:
    quality = load_manifest(folder).quality
    assert quality is not None and quality.precision == "int8" and len(quality.prompts) == 5
    assert 0.9 < quality.mean_iou < 0.9999 and 0.8 < quality.min_iou <= quality.mean_iou
    assert 0 < quality.largest_box_difference < 0.05 and 0 < quality.largest_score_difference < 0.05
    assert all(item.queries == TOP and item.min_iou <= item.mean_iou <= 1 for item in quality.prompts)
    assert quality.min_iou == min(item.min_iou for item in quality.prompts)
    console = Console(width=160, record=True)
    for part in pipeline_view(load_manifest(folder), folder, verbose=False):
        console.print(part)
    shown = console.export_text()
    assert f"mask IoU {quality.mean_iou:.4f} on average, {quality.min_iou:.4f} at worst" in shown and "costs" in shown


@pytest.mark.long
def test_files_in_fp32_have_the_masks_of_eager(tiny_pipeline: Path, tiny_model: nn.Module, folder: Path) -> None:
    """The measure itself: nothing lost in fp32, the manifest's own figures from the files of int8, far less of other masks."""
    target = OnnxTarget()
    model = module_image_source(tiny_model)(resolve_pipeline("onnx", {}).spec)
    answers = eager_answers(model, 0)
    for where, least in ((tiny_pipeline, 0.999), (folder, None)):
        manifest = load_manifest(where)
        found = quality_of(answers, manifest.components, lambda name, at=where: target.load_runner(at / name), "int8")  # type: ignore[misc]
        assert found == manifest.quality if least is None else found.min_iou > least and found.largest_box_difference < 1e-4
    swapped = [answer.masks[::-1] for answer in answers]
    assert min(iou(a, b) for answer, other in zip(answers, swapped, strict=True) for a, b in zip(answer.masks, other)) < 0.9  # noqa: B905


@pytest.mark.long
def test_it_runs_and_verifies_like_any_other(folder: Path, tiny_pipeline: Path, tiny_model: nn.Module) -> None:
    records = verify_pipeline(folder, module_image_source(tiny_model))
    assert all(record.passed for record in records) and any(record.from_unrounded for record in records)
    mine, plain = (Segmenter(where).segment(photograph(), "the red dog", threshold=0.0) for where in (folder, tiny_pipeline))
    assert np.abs(mine.scores - plain.scores).max() < 0.05
    assert np.mean([iou(a, b) for a, b in zip(mine.masks, plain.masks, strict=True)]) > 0.8


@pytest.mark.long
def test_a_joined_file_has_rounded_weights_too(
    folder: Path, tiny_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = load_manifest(folder)
    monkeypatch.setattr(ComponentJob, "export", taken_from(folder))
    export_pipeline(module_image_source(tiny_model), output=tmp_path / "out", fuse=True, weights="int8")
    manifest = load_manifest(tmp_path / "out")
    records = manifest.component(SEGMENTER).verification
    assert manifest.fused and records and all(record.passed and record.max_rel < 2e-5 for record in records)
    assert any((record.from_unrounded or 0) > 1e-4 for record in records)
    assert manifest.quality is not None and parts.quality is not None
    assert manifest.quality.mean_iou == pytest.approx(parts.quality.mean_iou, abs=1e-3)
    assert manifest.quality.largest_score_difference == pytest.approx(parts.quality.largest_score_difference, abs=1e-5)
    assert all(record.passed for record in verify_pipeline(tmp_path / "out", module_image_source(tiny_model)))


def test_a_planted_wrong_scale_is_caught(tiny_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = onnx_weights.as_int8
    monkeypatch.setattr(onnx_weights, "as_int8", lambda values: (p := right(values)) and (p[0], p[1] * np.float32(1.002)))
    export = partial(export_pipeline, module_image_source(tiny_model), output=tmp_path / "out", components=["text_encoder"])
    with pytest.raises(VerificationError, match="text_encoder"):
        export(weights="int8")


def test_a_part_of_a_pipeline_has_no_masks_to_compare(tiny_model: nn.Module, tmp_path: Path) -> None:
    manifest = export_pipeline(
        module_image_source(tiny_model), output=tmp_path / "out", components=["text_encoder"], weights="fp16"
    )
    assert manifest.quality is None and manifest.verified
    assert all(record.from_unrounded is None or record.from_unrounded < 0.01 for record in manifest.components[0].verification)
