"""Components of a pipeline on other targets than ONNX, through the same contract, and the page that says which work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sam3x.cli import app
from sam3x.errors import ArtifactError, SpecError
from sam3x.pipeline import export_pipeline
from sam3x.pipeline.compatibility import SMALL, Cell, markdown
from sam3x.pipeline.contract import COMPONENTS
from sam3x.pipeline.sources import random_image_source
from sam3x.runtime import Segmenter


def test_a_component_to_executorch_is_verified_and_a_part_does_not_run_alone(tmp_path: Path) -> None:
    manifest = export_pipeline(random_image_source(SMALL), target="pte", output=tmp_path / "out", components=["text_encoder"])
    (item,) = manifest.components
    assert item.file == "text_encoder.pte" and (tmp_path / "out" / item.file).is_file() and manifest.verified
    assert item.verification and all(record.passed and record.max_rel < 1e-5 for record in item.verification)
    assert item.ranges["prompts"] == (1, 2)  # ExecuTorch plans memory for the most
    with pytest.raises(ArtifactError, match="exported without its decoder"):
        Segmenter(tmp_path / "out")


@pytest.mark.parametrize(("component", "precision"), [("vision_encoder", "fp32"), ("decoder", "fp16")])
def test_a_component_to_tensorrt_is_one_engine(component: str, precision: str, tmp_path: Path) -> None:
    """Windows of a ViT, whose sizes TensorRT must know; queries repeated for each picture, frequencies counted in float32."""
    options: dict[str, Any] = {"target": "trt", "compute_capability": "sm89", "precision": precision}
    manifest = export_pipeline(random_image_source(SMALL), output=tmp_path / "out", components=[component], **options)
    (item,) = manifest.components
    assert item.facts["engines"] == 1 and item.facts["left_to_torch"] == 0


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
    page = markdown({"onnx": dict.fromkeys(COMPONENTS, good), "pte": {**dict.fromkeys(COMPONENTS, good), "decoder": bad}}, {})
    assert "| `decoder` | verified | no, see below |" in page
    assert "- `decoder` to pte: no form | of roi_align" in page and page.count("no, see below") == 1


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compatibility", "--target", "nowhere", "-o", str(tmp_path / "page.md"), "--quiet"])
    assert done.exit_code == 2 and "nowhere" in done.output and not (tmp_path / "page.md").exists()
