"""EfficientSAM3 from its checkpoint alone: which student it is, and its model by the package's builder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sam3x.errors import SourceError
from sam3x.pipeline import export_pipeline
from sam3x.runtime import Segmenter
from sam3x.sources.efficient import student_of, unwrapped
from sam3x.sources.image import checkpoint_image_source, draw_image_weights, module_image_source
from sam3x.sources.lint import lint
from sam3x.sources.state import TEXT, TRUNK
from sam3x.spec import make_spec
from support import efficient_model

BUILDER = "sam3.model_builder.build_efficientsam3_image_model"
TRUNKS = {
    "repvit": ("features.0.c.weight", {384: "m0.9", 512: "m1.1", 640: "m2.3"}),
    "tinyvit": ("patch_embed.seq.0.c.weight", {320: "5m", 448: "11m", 576: "21m"}),
    "efficientvit": ("input_stem.op_list.0.conv.weight", {128: "b0", 256: "b1", 384: "b2"}),
}
TEXTS = {"MobileCLIP-S0": (512, 4), "MobileCLIP-S1": (512, 12), "MobileCLIP2-L": (768, 12)}
STUDENTS = [(kind, width, name) for kind, (_, names) in TRUNKS.items() for width, name in names.items()]


def trunk_of(kind: str, width: int) -> dict[str, Tensor]:
    names = {f"{TRUNK}model.student_trunk.backbone.model.{TRUNKS[kind][0]}": torch.zeros(1)}
    return {**names, f"{TRUNK}model.student_trunk.head.0.weight": torch.zeros(1024, width, 1, 1)}


def text_of(name: str, positions: int) -> dict[str, Tensor]:
    width, layers = TEXTS[name]
    blocks = {f"{TEXT}transformer.{i}.pre_norm_mha.0.weight": torch.zeros(1) for i in range(layers)}
    return {**blocks, f"{TEXT}positional_embedding.pos_embed.pos_embed": torch.zeros(1, 1, positions, width)}


@pytest.mark.parametrize(("number", "kind", "width", "name"), [(i, *student) for i, student in enumerate(STUDENTS)])
def test_every_student_is_told_by_names_and_shapes(number: int, kind: str, width: int, name: str) -> None:
    text, positions = list(TEXTS)[number % 3], (16, 32, 77)[number // 3]
    found = student_of(unwrapped({**trunk_of(kind, width), **text_of(text, positions)}), "any.pt")
    assert (found.backbone_type, found.model_name) == (kind, name)
    assert (found.text, found.context_length, found.interactive) == (text, positions, False)


def test_metas_text_encoder_beside_a_student_and_metas_vit_beside_a_students_text() -> None:
    found = student_of(unwrapped({**trunk_of("repvit", 512), f"{TEXT}positional_embedding": torch.zeros(32, 1024)}), "any.pt")
    assert (found.text, found.context_length) == (None, 32)
    vit = {f"{TRUNK}pos_embed": torch.zeros(1, 2, 3), **text_of("MobileCLIP-S0", 77)}
    found = student_of(vit, "sam3_litetext_mobileclip_s0_ctx16.pt")
    assert (found.backbone_type, found.text, found.context_length) == (None, "MobileCLIP-S0", 16)


@pytest.mark.parametrize(
    ("state", "fact"),
    [
        (trunk_of("repvit", 7), "RepViT trunk of 7 channels"),
        ({f"{TRUNK}stem.weight": torch.zeros(1)}, "neither Meta's ViT nor RepViT"),
        (trunk_of("repvit", 512), "neither Meta's nor a MobileCLIP"),
        (
            {**trunk_of("repvit", 512), f"{TEXT}positional_embedding.pos_embed.pos_embed": torch.zeros(1, 1, 16, 512)},
            "width 512 and 0 attention layers",
        ),
    ],
    ids=["width", "trunk", "text", "layers"],
)
def test_what_no_release_has_is_said(state: dict[str, Tensor], fact: str) -> None:
    with pytest.raises(SourceError, match=fact):
        student_of(unwrapped(state), "any.pt")


def built(**others: Any) -> nn.Module:
    options: dict[str, Any] = {"device": "cpu", "eval_mode": True, "load_from_HF": False, "text_encoder_context_length": 16}
    options |= {"backbone_type": "repvit", "model_name": "m0.9", "text_encoder_type": "MobileCLIP-S0"}
    model = efficient_model.build_efficientsam3_image_model(**options, **others)
    draw_image_weights(model, 3)
    return model


@pytest.fixture(scope="module")
def live() -> nn.Module:
    return built()


@pytest.fixture
def checkpoint(live: nn.Module, tmp_path: Path) -> Path:
    state = {
        f"detector.{name}".replace("trunk.model.", "trunk.model.student_trunk."): v for name, v in live.state_dict().items()
    }
    torch.save({"model": state}, tmp_path / "student.pt")
    return tmp_path / "student.pt"


def test_a_students_checkpoint_is_exported_from_itself_alone(
    live: nn.Module, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BUILDER, efficient_model.build_efficientsam3_image_model, raising=False)
    report = lint(checkpoint)
    assert report.clean and report.exports == ("image model", "fusion encoder")
    assert report.metadata == {"trunk": "RepViT m0.9", "text encoder": "MobileCLIP-S0, 16 tokens"}
    source = checkpoint_image_source(checkpoint)
    assert source(make_spec()).weights_sha256 == module_image_source(live)(make_spec()).weights_sha256
    manifest = export_pipeline(source, output=tmp_path / "out", components=["vision_encoder", "text_encoder"])
    assert manifest.verified and manifest.image_size == 1008 and manifest.context_length == 16
    assert manifest.origin == "checkpoint student.pt, EfficientSAM3 RepViT m0.9, MobileCLIP-S0"


@pytest.mark.long
def test_a_students_head_for_clicks_is_exported_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tracker stands beside the detector, as in Meta's release."""
    monkeypatch.setattr(BUILDER, efficient_model.build_efficientsam3_image_model, raising=False)
    model, place = built(enable_inst_interactivity=True), "inst_interactive_predictor.model."
    state = {
        name.replace(place, "tracker.") if name.startswith(place) else f"detector.{name}": value
        for name, value in model.state_dict().items()
    }
    torch.save({"model": state}, tmp_path / "student.pt")
    report = lint(tmp_path / "student.pt")
    assert report.clean and "interactive head" in str(report)
    source = checkpoint_image_source(tmp_path / "student.pt")
    manifest = export_pipeline(source, output=tmp_path / "out", components=["vision_encoder", "interactive_head"])
    assert manifest.verified and manifest.weights_sha256 == module_image_source(model)(make_spec()).weights_sha256
    assert manifest.origin == "checkpoint student.pt, EfficientSAM3 RepViT m0.9, MobileCLIP-S0, interactive head"
    found = Segmenter(tmp_path / "out").click(np.full((90, 80, 3), 90, np.uint8), points=[[[9, 8]], [[40, 30], [7, 9]]])
    assert len(found) == 6 and np.isfinite(found.logits).all() and found.masks.shape == (6, 90, 80)


def test_metas_package_is_told_from_efficientsam3s(checkpoint: Path) -> None:
    report = lint(checkpoint)
    assert report.exports == ("fusion encoder",) and "installed sam3 package is Meta's" in str(report.traps)
    assert report.remedy.startswith("Install EfficientSAM3's: pip install")
    with pytest.raises(SourceError, match=r"is Meta's, which cannot build EfficientSAM3 RepViT m0\.9.*pip install"):
        checkpoint_image_source(checkpoint)(make_spec())


def test_a_builder_that_fails_and_weights_that_are_missing_are_named(
    live: nn.Module, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BUILDER, efficient_model.build_efficientsam3_image_model, raising=False)
    state = torch.load(checkpoint, weights_only=True)["model"]
    lost = "detector.backbone.language_backbone.projector.bias"
    torch.save({name: value for name, value in state.items() if name != lost}, checkpoint)
    assert lint(checkpoint).missing == (lost.removeprefix("detector."),)
    wider = {name: torch.zeros(32, 512, 1, 1) if name.endswith("head.0.weight") else value for name, value in state.items()}
    torch.save(wider, checkpoint)
    with pytest.raises(SourceError, match=r"cannot build EfficientSAM3 RepViT m1\.1.*Unknown model"):
        checkpoint_image_source(checkpoint)(make_spec())
