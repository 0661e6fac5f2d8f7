"""``--image-size``: a model for pictures of another size is the one that upstream's own code builds for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sam3x.errors import SourceError, SpecError
from sam3x.pipeline.request import resolve, resolve_pipeline
from sam3x.sources.contract import ImageModel
from sam3x.sources.image import draw_image_weights, module_image_source
from sam3x.sources.image_model import build_image_model
from sam3x.sources.names import DETECTOR, INTERACTIVE_HEAD
from sam3x.spec import make_spec
from support import transformers_model
from support.efficient_model import build_efficientsam3_image_model
from support.image_model import TINY, state_of

META = TINY.model_copy(update={"interactive": True})
KINDS = ["Sam3Image", "Sam3Model", "Sam3LiteTextModel", "Sam3TrackerModel", "Sam3VideoModel"]


def built(kind: str, size: int) -> nn.Module:
    """The same weights in a model that its own package builds for pictures of ``size``."""
    with pytest.MonkeyPatch.context() as patch:
        if kind == "Sam3Image":
            model = build_image_model(META.model_copy(update={"image_size": size}))
            draw_image_weights(model, 3)
            return model
        grid, vision = size // 14, transformers_model.VISION
        trunk = {**vision["backbone_config"], "image_size": size}  # type: ignore[dict-item]
        sizes = [[times * grid, times * grid] for times in (4, 2, 1)]
        resized: dict[str, Any] = {**vision, "backbone_config": trunk, "backbone_feature_sizes": sizes}
        prompts = {**transformers_model.HEADS["prompt_encoder_config"], "image_size": size}
        patch.setattr(transformers_model, "SIZE", size)
        patch.setattr(transformers_model, "VISION", resized)
        patch.setattr(transformers_model, "PARTS", {**transformers_model.PARTS, "vision_config": resized})
        patch.setattr(transformers_model, "HEADS", {**transformers_model.HEADS, "prompt_encoder_config": prompts})
        made = {"Sam3TrackerModel": transformers_model.tiny_tracker, "Sam3VideoModel": transformers_model.tiny_video}
        return made[kind]() if kind in made else transformers_model.tiny(kind)


def answers(model: ImageModel, size: int) -> dict[str, torch.Tensor]:
    """What the vision encoder makes of noise, and the interactive head, where there is one, of a click and a mask."""
    parts = {item.name: item for item in model.components}
    noise = torch.Generator().manual_seed(size)
    found = parts[DETECTOR[0]].eager({"image": torch.randn((1, 3, size, size), generator=noise)})
    if INTERACTIVE_HEAD in parts:
        given = {
            "point_coords": torch.rand((1, 1, 2), generator=noise) * size,
            "point_labels": torch.ones((1, 1), dtype=torch.long),
            "mask_input": torch.randn((1, 1, 4 * (size // 14), 4 * (size // 14)), generator=noise),
            "has_mask_input": torch.tensor([True]),
        }
        found |= parts[INTERACTIVE_HEAD].eager(parts[INTERACTIVE_HEAD].feed({**found, **given}))
    return found


@pytest.mark.parametrize("size", [56, 70, 168], ids=["one window", "padded windows", "larger"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_the_one_that_its_own_package_builds_for_that_size(kind: str, size: int) -> None:
    model = built(kind, 112)
    before = state_of(model)
    mine = module_image_source(model)(make_spec(image_size=size))
    theirs = module_image_source(built(kind, size))(make_spec())
    assert state_of(model) == before and mine.image_size == theirs.image_size == size
    assert [(item.name, item.ranges) for item in mine.components] == [(item.name, item.ranges) for item in theirs.components]
    assert [f"pictures of {size} pixels in place of its own 112" in note for note in mine.notes] == [True]
    wanted = answers(theirs, size)
    for name, value in answers(mine, size).items():
        assert torch.equal(value, wanted[name]), name


def test_its_own_size_changes_nothing() -> None:
    assert module_image_source(built("Sam3Image", 112))(make_spec(image_size=112)).notes == ()


@pytest.mark.parametrize("kind", ["Sam3Image", "Sam3Model", "Sam3TrackerModel"])
@pytest.mark.parametrize(
    ("size", "fact", "remedy"),
    [
        (100, "a picture of 100 pixels is not made of patches of 14", "Give --image-size 98 or 112."),
        (42, "a picture of 42 pixels is smaller than a window of its trunk, 4 patches", "Give --image-size 56 or more"),
    ],
)
def test_sizes_that_are_none(kind: str, size: int, fact: str, remedy: str) -> None:
    with pytest.raises(SourceError) as caught:
        module_image_source(built(kind, 112))(make_spec(image_size=size))
    assert fact in caught.value.fact and remedy in caught.value.remedy


def test_no_number_of_pixels() -> None:
    for value in (0, -14, "large"):
        with pytest.raises(SpecError, match="image_size"):
            resolve_pipeline("onnx", {"image_size": value})
    assert resolve_pipeline("onnx", {"image_size": "672"}).spec.image_size == 672


def test_a_fusion_encoder_by_itself_sees_no_picture() -> None:
    with pytest.raises(SpecError, match="--image-size belongs to a whole model"):
        resolve("onnx", {"image_size": 672})


def test_a_students_trunk_takes_its_own_size_alone() -> None:
    options: dict[str, Any] = {"backbone_type": "repvit", "model_name": "m0.9", "text_encoder_type": "MobileCLIP-S0"}
    model = build_efficientsam3_image_model(device="cpu", eval_mode=True, load_from_HF=False, **options)
    source = module_image_source(model)
    with pytest.raises(SourceError, match="its trunk, Trunk, is made for pictures of 1008 pixels") as caught:
        source(make_spec(image_size=672))
    assert "Leave --image-size out" in caught.value.remedy
    assert source(make_spec(image_size=1008)).image_size == 1008


def test_rotary_tables_of_its_own_are_not_computed_anew() -> None:
    model: Any = built("Sam3Image", 112)
    table = model.backbone.vision_backbone.trunk.blocks[1].attn.freqs_cis
    table.copy_(table.roll(1, dims=0))
    with pytest.raises(SourceError, match="rotary tables of its own for pictures of 112 pixels"):
        module_image_source(model)(make_spec(image_size=168))
