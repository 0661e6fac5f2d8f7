"""A fused pipeline: three files that give what the six give, verified, inspected and refused like them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from torch import nn
from typer.testing import CliRunner

from sam3x.bench.pipeline import bench_pipeline
from sam3x.cli.app import app
from sam3x.errors import ArtifactError, SourceError, SpecError, VerificationError
from sam3x.pipeline import export_pipeline, module_image_source, random_image_source, verify_pipeline
from sam3x.pipeline.compatibility import SMALL
from sam3x.pipeline.export import ComponentJob
from sam3x.pipeline.fuse import FOUND, _between
from sam3x.runtime import EncodedImage, Segmenter
from sam3x.runtime.manifest import SEGMENTER, load_manifest
from sam3x.sources.names import INTERACTIVE_HEAD
from sam3x.targets.onnx import detect as onnx_detect
from support.image_model import between, photograph, taken_from
from support.transformers_model import tiny_tracker

BOX, OTHER = [60.0, 80.0, 300.0, 390.0], [350.0, 20.0, 620.0, 200.0]


@pytest.fixture(scope="module")
def folder(fused_pipeline: Path) -> Path:
    return fused_pipeline


@pytest.fixture(scope="module")
def encoded(folder: Path) -> EncodedImage:
    return Segmenter(folder).encode(photograph())


PROMPTS: dict[str, dict[str, Any]] = {
    "text": {"text": "the red dog"},
    "box": {"boxes": [BOX]},
    "two boxes, one negative": {"boxes": [BOX, OTHER], "labels": [True, False]},
    "text and box": {"text": "the car", "boxes": [OTHER]},
    "many prompts": {"text": ["dog", "the red car", "and", "visual", "a"], "boxes": [[BOX], [], [OTHER, BOX], [], []]},
    "no hit": {"text": ["the red dog", "car"], "threshold": 0.999},
    "every query": {"text": ["dog", "car"], "threshold": 0.0},
    "a threshold each, and a cap": {"text": ["dog", "car"], "threshold": [0.0, 0.05], "max_detections": 3},
}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_same_detections_and_masks_as_unfused(name: str, folder: Path, tiny_pipeline: Path, encoded: EncodedImage) -> None:
    six, three = Segmenter(tiny_pipeline), Segmenter(folder)
    prompt = PROMPTS[name]
    if "threshold" not in prompt:
        prompt = {**prompt, "threshold": between(six.segment(encoded, **prompt, threshold=0.0).scores)}
    wanted, found = six.segment(encoded, **prompt), three.segment(encoded, **prompt)
    assert len(found) == len(wanted) and (len(found) == 0) == (name == "no hit") and found.prompts == wanted.prompts
    np.testing.assert_array_equal(found.prompt, wanted.prompt)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
    np.testing.assert_allclose(found.boxes, wanted.boxes, atol=5e-3)
    assert found.masks.shape == wanted.masks.shape and (found.masks != wanted.masks).mean() < 1e-5 if len(found) else True


def test_three_files_verified_and_nothing_left_of_the_parts(folder: Path) -> None:
    manifest = load_manifest(folder)
    names = ["vision_encoder", "text_encoder", INTERACTIVE_HEAD, SEGMENTER]
    assert [item.name for item in manifest.components] == names and manifest.fused
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {*manifest.files, "manifest.json"}
    whole = manifest.component(SEGMENTER)
    assert manifest.verified and all(record.passed and record.max_rel < 1e-5 for record in whole.verification)
    assert {record.output for record in whole.verification} == set(FOUND)
    assert any("0 found" in record.case for record in whole.verification)
    assert whole.constants == {"dac": False} and whole.reads["threshold"] == "threshold" and "image_tokens" in whole.reads
    assert [item.shape[0] for item in whole.outputs] == ["found"] * 4
    assert {"prompts", "boxes", "text_length", "found"} == set(whole.ranges)


def test_the_files_own_inputs_and_outputs_are_the_manifests(folder: Path) -> None:
    whole = load_manifest(folder).component(SEGMENTER)
    graph = onnx.load(folder / whole.file).graph
    shapes = {
        value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {item.name: item.shape for item in (*whole.inputs, *whole.outputs)}


def test_verify_and_inspect_and_run_and_bench(folder: Path, tiny_model: nn.Module, tmp_path: Path) -> None:
    records = verify_pipeline(folder, module_image_source(tiny_model))
    assert {record.output for record in records} == {
        "fpn_0",
        "fpn_1",
        "image_tokens",
        "image_pos",
        "text_features",
        "text_mask",
        "high_res_feats_0",
        "high_res_feats_1",
        "image_embed",
        "low_res_masks",
        "iou_predictions",
        *FOUND,
    }
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert shown.exit_code == 0 and "segmenter.onnx" in shown.output and "mask_head" not in shown.output
    photograph().save(tmp_path / "photo.png")
    done = CliRunner().invoke(app, ["run", str(folder), str(tmp_path / "photo.png"), "--text", "dog", "--threshold", "0"])
    assert done.exit_code == 0 and "12 found" in done.output
    report = bench_pipeline(folder, eager=False, picture=tmp_path / "photo.png", threshold=0.0, threads=1, repeat=1)
    assert report.contenders["pipeline"].detections == 12


def test_clicks_are_answered_beside_the_joined_file(folder: Path, tiny_pipeline: Path, encoded: EncodedImage) -> None:
    """The head is a file of its own; the joined one and it are fed by the same pass over the picture."""
    click: dict[str, Any] = {"points": [[[300, 200]], [[60, 40], [20, 30]]], "box": [BOX, None]}
    found, wanted = (Segmenter(path).click(encoded, **click) for path in (folder, tiny_pipeline))
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-5)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-6)


def test_a_source_of_clicks_alone_has_nothing_to_join(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="it answers clicks alone"):
        export_pipeline(module_image_source(tiny_tracker()), output=tmp_path / "out", fuse=True)


def test_a_changed_file_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with (copy / "segmenter.onnx").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ArtifactError, match=r"segmenter\.onnx was changed"):
        Segmenter(copy)


def test_a_joined_file_that_is_wrong_leaves_nothing(
    tiny_pipeline: Path, tiny_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fuse(folder: Path) -> None:
        export_pipeline(module_image_source(tiny_model), output=folder, fuse=True)

    monkeypatch.setattr(ComponentJob, "export", taken_from(tiny_pipeline))
    fuse(tmp_path / "right")
    assert load_manifest(tmp_path / "right").fused
    monkeypatch.setattr(onnx_detect, "_SELECT", onnx_detect._SELECT.replace("Greater (scores", "Less (scores"))
    with pytest.raises(VerificationError, match="onnx segmenter"):
        fuse(tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (["--pipeline", "--fuse", "--target", "pte"], "the target is pte. Leave --fuse out, or take --target onnx."),
        (["--pipeline", "--fuse", "--components", "decoder"], "Leave --components out, or --fuse"),
        (["--fuse"], "belong to --pipeline"),
    ],
)
def test_what_cannot_be_joined_is_told(options: list[str], fact: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", *options, "-o", str(tmp_path / "out")])
    assert done.exit_code == 2 and fact in " ".join(done.output.split()) and not (tmp_path / "out").exists()


def test_the_same_in_python(tmp_path: Path) -> None:
    for options in ({"target": "pte"}, {"components": ["decoder"]}):
        with pytest.raises(SpecError, match="--fuse joins"):
            export_pipeline(random_image_source(SMALL), output=tmp_path / "out", fuse=True, **options)  # type: ignore[arg-type]


def test_a_threshold_of_the_verification_has_no_score_near_it() -> None:
    import torch

    close = torch.linspace(0.1, 0.101, 200).reshape(2, 100)
    assert _between(close, 1e-4) == -1.0  # all are found
    close[1, 50:] += 0.3
    assert 0.11 < _between(close, 1e-4) < 0.4  # 50 are found
    spread = torch.linspace(0.1, 0.9, 200).reshape(2, 100)
    assert int((spread > _between(spread, 1e-4)).sum()) == 12
