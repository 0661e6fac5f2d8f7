"""transformers' ``Sam3TrackerModel`` through the exported pipeline: masks, scores and logits of its own processor and model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sam3x.errors import ArtifactError
from sam3x.pipeline import export_pipeline
from sam3x.runtime import EncodedImage, Segmenter
from sam3x.sources.image import transformers_image_source
from support.image_model import iou, photograph
from support.transformers_model import SIZE, tiny_tracker

POINT, AWAY, BOX = [300.0, 200.0], [60.0, 40.0], [120.0, 90.0, 480.0, 400.0]


@pytest.fixture(scope="module")
def tracker() -> Any:
    return tiny_tracker()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return photograph()


@pytest.fixture(scope="module")
def segmenter(tracker: Any, tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    folder = tmp_path_factory.mktemp("tracker")
    tracker.save_pretrained(folder / "saved")
    manifest = export_pipeline(transformers_image_source(folder / "saved"), output=folder / "out")
    assert [item.name for item in manifest.components] == ["vision_encoder", "interactive_head"] and manifest.verified
    return Segmenter(folder / "out")


@pytest.fixture(scope="module")
def encoded(segmenter: Segmenter, picture: Image.Image) -> EncodedImage:
    return segmenter.encode(picture)


def asked(tracker: Any, picture: Image.Image, multimask: bool, masks: Any = None, **prompt: Any) -> Any:
    """transformers' own processor and model on one picture: masks at its size, scores, logits, a row an object."""
    from transformers import Sam3ImageProcessor, Sam3TrackerProcessor

    images = Sam3ImageProcessor(size={"height": SIZE, "width": SIZE}, mask_size={"height": 32, "width": 32})
    processor = Sam3TrackerProcessor(images, target_size=SIZE)
    given = processor(images=picture, return_tensors="pt", **prompt)
    sizes = given.pop("original_sizes")
    with torch.no_grad():
        out = tracker(**given, input_masks=masks, multimask_output=multimask)
    full = processor.post_process_masks(out.pred_masks, sizes)[0]
    return full.numpy(), out.iou_scores[0].numpy(), out.pred_masks[0].numpy()


CLICKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "points": (
        {"points": [POINT, AWAY], "labels": [1, 0]},
        {"input_points": [[[POINT, AWAY]]], "input_labels": [[[1, 0]]]},
    ),
    "a box": ({"box": BOX}, {"input_boxes": [[BOX]]}),
    "a box and a point": (
        {"points": [POINT], "box": BOX},
        {"input_points": [[[POINT]]], "input_labels": [[[1]]], "input_boxes": [[BOX]]},
    ),
    "objects": ({"points": [[POINT], [AWAY]]}, {"input_points": [[[POINT], [AWAY]]], "input_labels": [[[1], [1]]]}),
}


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("name", [*CLICKS, "a mask", "a mask and a point"])
def test_the_same_masks_as_transformers_gives(
    name: str, multimask: bool, tracker: Any, picture: Image.Image, segmenter: Segmenter, encoded: EncodedImage
) -> None:
    mine, theirs = CLICKS.get(name, ({}, {}))
    fed = None
    if "mask" in name:
        fed = segmenter.click(encoded, points=[POINT]).best.logits
        if "point" in name:
            mine, theirs = {"points": [AWAY]}, {"input_points": [[[AWAY]]], "input_labels": [[[1]]]}
    found = segmenter.click(encoded, **mine, mask=fed, multimask=multimask)
    masks, scores, logits = asked(tracker, picture, multimask, None if fed is None else torch.from_numpy(fed)[None], **theirs)
    logits = logits.reshape(-1, *logits.shape[-2:])
    np.testing.assert_allclose(found.logits, logits, atol=1e-5 * np.abs(logits).max())
    np.testing.assert_allclose(found.scores, scores.ravel(), atol=1e-5)
    assert all(iou(a, b) >= 0.999 for a, b in zip(found.masks, masks.reshape(found.masks.shape), strict=True))


def test_words_for_a_pipeline_of_clicks_alone_are_one_sentence(segmenter: Segmenter, encoded: EncodedImage) -> None:
    with pytest.raises(
        ArtifactError, match=r"without its prompt_encoder: it has vision_encoder, interactive_head\. Export a source"
    ):
        segmenter.segment(encoded, "dog")


@pytest.mark.parametrize("rules", [(0.3, 0.1, 0.7), (0.5, 0.6, 0.9)])
def test_everything_is_what_the_mask_generation_pipeline_finds(
    rules: tuple[float, float, float], tracker: Any, picture: Image.Image, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of random weights cover the whole picture above 0; above 2.5 they are masks of all sizes."""
    import transformers

    clicks, manifest = segmenter.manifest.clicks, segmenter.manifest
    assert clicks is not None
    changed = manifest.model_copy(update={"clicks": dataclasses.replace(clicks, mask_threshold=2.5)})
    monkeypatch.setattr(segmenter, "manifest", changed)
    picture = picture.crop((100, 0, 500, 400))  # square: on another the pipeline's grid leaves a strip out
    images = transformers.Sam3ImageProcessor(size={"height": SIZE, "width": SIZE}, mask_size={"height": 32, "width": 32})
    ask = transformers.pipeline("mask-generation", model=tracker, image_processor=images, device="cpu")
    named = dict(zip(("pred_iou_thresh", "stability_score_thresh", "crops_nms_thresh"), rules, strict=True))
    wanted = ask(picture, points_per_crop=5, points_per_batch=8, mask_threshold=2.5, stability_score_offset=0.05, **named)
    named["box_nms_thresh"] = named.pop("crops_nms_thresh")
    options = {"points_per_side": 5, "stability_score_offset": 0.05, **named}
    found = segmenter.everything(picture, **options)
    assert 1 < len(found) == len(wanted["masks"]) < 75 and found.prompts[0] == "object 1"
    np.testing.assert_allclose(found.scores, wanted["scores"], atol=1e-5)
    assert all(iou(found.mask(index), np.asarray(mask)) >= 0.999 for index, mask in enumerate(wanted["masks"]))
    np.testing.assert_array_equal(segmenter.everything(picture, **options, max_detections=2).scores, found.scores[:2])
