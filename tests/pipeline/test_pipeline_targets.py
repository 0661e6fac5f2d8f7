"""Components of a pipeline on other targets than ONNX, through the same contract, and the page that says which work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sam3x.capture.program import Sample
from sam3x.cli.app import app
from sam3x.errors import ArtifactError, SpecError
from sam3x.pipeline import export_pipeline
from sam3x.pipeline.compatibility import ROWS, SMALL, TARGETS, Cell, markdown
from sam3x.pipeline.request import resolve_pipeline
from sam3x.runtime import Segmenter
from sam3x.sources.image import random_image_source
from sam3x.verify.component import verify_component


@pytest.mark.long
def test_a_component_to_executorch_is_verified_and_a_part_does_not_run_alone(tmp_path: Path) -> None:
    manifest = export_pipeline(random_image_source(SMALL), target="pte", output=tmp_path / "out", components=["text_encoder"])
    (item,) = manifest.components
    assert item.file == "text_encoder.pte" and (tmp_path / "out" / item.file).is_file() and manifest.verified
    assert item.verification and all(record.passed and record.max_rel < 1e-5 for record in item.verification)
    assert item.ranges["prompts"] == (1, 2)  # ExecuTorch plans memory for the most
    with pytest.raises(ArtifactError, match="exported without its decoder"):
        Segmenter(tmp_path / "out")


@pytest.mark.parametrize(
    ("component", "precision"), [("vision_encoder", "fp32"), pytest.param("decoder", "fp16", marks=pytest.mark.long)]
)
def test_a_component_to_tensorrt_is_one_engine(component: str, precision: str, tmp_path: Path) -> None:
    """Windows of a ViT, whose sizes TensorRT must know; queries repeated for each picture, frequencies counted in float32."""
    options: dict[str, Any] = {"target": "trt", "compute_capability": "sm89", "precision": precision}
    manifest = export_pipeline(random_image_source(SMALL), output=tmp_path / "out", components=[component], **options)
    (item,) = manifest.components
    assert item.metadata["engines"] == 1 and item.metadata["left_to_torch"] == 0


def prompts_with(boxes: int, prompts: int = 2, text: int = 5) -> Sample:
    """A sample of the prompt encoder: boxes of any size, also outside the picture, some of them padding."""
    generator = torch.Generator().manual_seed(boxes)
    width, tokens = SMALL.d_model, (SMALL.image_size // 14) ** 2
    box_mask = torch.zeros((prompts, boxes), dtype=torch.bool)
    box_mask[1:, boxes // 2 :] = True
    inputs = {
        "text_features": torch.randn((prompts, text, width), generator=generator),
        "text_mask": torch.zeros((prompts, text), dtype=torch.bool),
        "boxes": torch.rand((prompts, boxes, 4), generator=generator) * 2 - 0.5,
        "box_labels": torch.randint(0, 2, (prompts, boxes), generator=generator),
        "box_mask": box_mask,
        "image_tokens": torch.randn((1, tokens, width), generator=generator),
        "image_pos": torch.randn((1, tokens, width), generator=generator),
    }
    return Sample(branch="fixed", case=f"{boxes} boxes", inputs=inputs, large=True)


@pytest.mark.long
def test_the_prompt_encoder_runs_in_executorch_with_any_number_of_boxes(tmp_path: Path) -> None:
    """XNNPACK and ExecuTorch have no ``roi_align``."""
    folder = tmp_path / "out"
    manifest = export_pipeline(random_image_source(SMALL), target="pte", output=folder, components=["prompt_encoder"])
    (item,) = manifest.components
    assert manifest.verified and all(record.passed and record.max_rel < 1e-5 for record in item.verification)
    (record,) = (record for record in item.passes if record.name == "decompose_roi_align")
    assert record.modified and record.rewrites == 1
    request = resolve_pipeline("pte", {})
    component = next(part for part in random_image_source(SMALL)(request.spec).components if part.name == "prompt_encoder")
    samples = [prompts_with(boxes) for boxes in (1, 3, 17, 64)]
    records = verify_component(component, lambda: request.target.load_runner(folder / item.file), samples)
    assert all(record.passed for record in records)


@pytest.mark.long
def test_an_engine_of_the_prompt_encoder_is_built(tmp_path: Path) -> None:
    options = {"output": tmp_path / "out", "components": ["prompt_encoder"], **TARGETS["trt"]}
    manifest = export_pipeline(random_image_source(SMALL), target="trt", **options)  # type: ignore[arg-type]
    (item,) = manifest.components
    assert item.metadata["engines"] == 1 and item.metadata["left_to_torch"] == 0
    assert max(item.metadata["drift"].values(), key=str)
    assert (tmp_path / "out" / "prompt_encoder.engine").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "fact"),
    [({"components": ["trunk"]}, "no component trunk"), ({"target": "pte", "precision": "bf16"}, "precision")],
)
def test_what_cannot_be_is_told_at_once(options: dict[str, object], fact: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=fact):
        export_pipeline(random_image_source(SMALL), output=tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_page_gives_a_reason_for_every_empty_cell() -> None:
    good, bad = Cell(True, "verified"), Cell(False, "no form | of roi_align")
    page = markdown({"onnx": dict.fromkeys(ROWS, good), "pte": {**dict.fromkeys(ROWS, good), "`decoder`": bad}}, {})
    assert "| `decoder` | verified | no, see below |" in page
    assert "- `decoder` to pte: no form | of roi_align" in page and page.count("no, see below") == 1


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compatibility", "--target", "nowhere", "-o", str(tmp_path / "page.md"), "--quiet"])
    assert done.exit_code == 2 and "nowhere" in done.output and not (tmp_path / "page.md").exists()
