"""Clicks through the exported pipeline: the same masks, scores and logits as upstream's interactive predictor gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from sam3x.errors import ArtifactError, SpecError
from sam3x.pipeline import export_pipeline, module_image_source
from sam3x.runtime import Clicked, EncodedImage, Segmenter
from support.image_model import Predictor, iou

POINT, SECOND, AWAY = [300.0, 200.0], [420.0, 330.0], [60.0, 40.0]
BOX, OTHER_BOX = [120.0, 90.0, 480.0, 400.0], [20.0, 30.0, 700.0, 200.0]


@pytest.fixture(scope="module")
def upstream(tiny_model: nn.Module, picture: Image.Image) -> Predictor:
    return Predictor(tiny_model, picture)


def assert_same(found: Clicked, wanted: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Low-resolution logits within 1e-5 of their largest value, scores within 1e-5, masks of IoU 0.999."""
    masks, scores, logits = (np.asarray(item) for item in wanted)
    logits = logits.reshape(-1, *logits.shape[-2:])
    assert found.logits.shape == logits.shape
    np.testing.assert_allclose(found.logits, logits, atol=1e-5 * np.abs(logits).max())
    np.testing.assert_allclose(found.scores, scores.ravel(), atol=1e-5)
    assert all(iou(mine, its > 0) >= 0.999 for mine, its in zip(found.masks, masks.reshape(found.masks.shape), strict=True))


CLICKS: dict[str, dict[str, Any]] = {
    "a point": {"points": [POINT]},
    "a negative point": {"points": [POINT, AWAY], "labels": [1, 0]},
    "many points": {"points": np.linspace(5, 420, 40).reshape(20, 2), "labels": [1, 0] * 10},
    "a box": {"box": BOX},
    "a box over the edge": {"box": OTHER_BOX},
    "a box and points": {"points": [POINT, AWAY], "labels": [True, False], "box": BOX},
    "objects": {"points": [[POINT], [AWAY], [SECOND]], "labels": [[1], [1], [1]]},
    "boxes": {"box": [BOX, OTHER_BOX]},
    "boxes and points": {"points": [[POINT], [SECOND]], "labels": [[1], [0]], "box": [BOX, OTHER_BOX]},
}


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("name", CLICKS)
def test_the_same_masks_as_upstreams_predictor(
    name: str, multimask: bool, segmenter: Segmenter, encoded: EncodedImage, upstream: Predictor
) -> None:
    click = CLICKS[name]
    found = segmenter.click(encoded, **click, multimask=multimask)
    points = None if "points" not in click else np.asarray(click["points"])
    labels = None if points is None else np.asarray(click.get("labels", np.ones(points.shape[:-1])), dtype=np.int64)
    given = {"point_coords": points, "point_labels": labels, "box": np.asarray(click["box"]) if "box" in click else None}
    assert_same(found, upstream(**given, multimask_output=multimask))


@pytest.mark.long
@pytest.mark.parametrize("target", ["pte", "openvino"])
def test_the_same_masks_from_files_of_other_targets(
    target: str, tiny_model: nn.Module, picture: Image.Image, upstream: Predictor, tmp_path: Path
) -> None:
    parts = ["vision_encoder", "interactive_head"]
    export_pipeline(module_image_source(tiny_model), output=tmp_path / "out", target=target, components=parts)
    segmenter = Segmenter(tmp_path / "out")
    encoded = segmenter.encode(picture)
    for name in CLICKS:
        for multimask in (True, False):
            test_the_same_masks_as_upstreams_predictor(name, multimask, segmenter, encoded, upstream)
    test_a_mask_fed_back_is_taken_as_upstream_takes_it(True, segmenter, encoded, upstream)
    test_objects_of_any_number_of_points_are_each_as_if_alone(segmenter, encoded)


@pytest.mark.parametrize("multimask", [True, False])
def test_a_mask_fed_back_is_taken_as_upstream_takes_it(
    multimask: bool, segmenter: Segmenter, encoded: EncodedImage, upstream: Predictor
) -> None:
    first = segmenter.click(encoded, points=[POINT])
    _, scores, logits = upstream(point_coords=np.array([POINT]), point_labels=np.array([1]))
    assert first.best.logits.shape == (1, 32, 32) and len(first) == 3 and len(first.best) == 1
    fed = logits[[int(scores.argmax())]]
    points, labels = [POINT, AWAY], [1, 0]
    found = segmenter.click(encoded, points=points, labels=labels, mask=first.best.logits, multimask=multimask)
    given = {"point_coords": np.array(points), "point_labels": np.array(labels)}
    assert_same(found, upstream(**given, mask_input=fed, multimask_output=multimask))
    alone = segmenter.click(encoded, mask=first.best.logits[0], multimask=multimask)
    assert_same(alone, upstream(mask_input=fed, multimask_output=multimask))


def test_objects_of_any_number_of_points_are_each_as_if_alone(segmenter: Segmenter, encoded: EncodedImage) -> None:
    fed = segmenter.click(encoded, points=[POINT]).best.logits[0]
    points = [[POINT, SECOND], [], [AWAY], None, [POINT, AWAY, SECOND], [SECOND]]
    box, mask = [None, BOX, None, None, OTHER_BOX, None], [None, None, None, fed, None, fed]
    together = segmenter.click(encoded, points=points, box=box, mask=mask)
    assert len(together) == 18 and together.prompts[5] == "object 6" and len(together.best) == 6
    for index, own in enumerate(zip(points, box, mask, strict=True)):
        alone = segmenter.click(encoded, points=own[0] or None, box=own[1], mask=own[2])
        rows = together.prompt == index
        np.testing.assert_allclose(together.logits[rows], alone.logits, atol=1e-4)
        np.testing.assert_allclose(together.scores[rows], alone.scores, atol=1e-5)
        assert together.best.scores[index] == together.scores[rows].max()


def test_one_pass_over_the_picture_serves_words_and_clicks(segmenter: Segmenter, picture: Image.Image) -> None:
    calls: list[str] = []
    components = segmenter._components
    run = components.run
    with mock.patch.object(components, "run", lambda name, tensors: calls.append(name) or run(name, tensors)):
        image = segmenter.encode(picture)
        segmenter.segment(image, ["dog", "car"], threshold=0.999)
        first = segmenter.click(image, points=[POINT])
        segmenter.click(image, points=[POINT, AWAY], labels=[1, 0], mask=first.best.logits, multimask=False)
        segmenter.segment(image, "dog", boxes=[BOX], threshold=0.999)
    assert calls.count("vision_encoder") == 1 and calls.count("interactive_head") == 2


def test_a_result_of_clicks_is_drawn_and_told_like_another(segmenter: Segmenter, encoded: EncodedImage) -> None:
    found = segmenter.click(encoded, points=[[POINT], [AWAY]])
    told = found.to_dict()
    assert [item["label"] for item in told["detections"]] == ["object 1"] * 3 + ["object 2"] * 3
    for box, mask in zip(found.boxes, found.masks, strict=True):
        rows, columns = np.nonzero(mask)
        edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
        assert box.tolist() == edges
    assert found.best.draw().size == encoded.picture.size


@pytest.mark.parametrize(
    ("given", "fact"),
    [
        ({}, "nothing is clicked"),
        ({"labels": [1]}, "labels without points"),
        ({"points": [[1, 2, 3]]}, "points are pairs"),
        ({"points": [1, 2]}, "points are pairs"),
        ({"points": "here"}, "points are pairs"),
        ({"points": [[1, float("nan")]]}, "points are pairs"),
        ({"points": [[1, 2], [[3, 4]]]}, "points are pairs"),
        ({"points": [[1, 2]], "labels": [2]}, "True for what is wanted"),
        ({"points": [[1, 2]], "labels": [1, 0]}, "2 labels for 1 points"),
        ({"points": [[[1, 2]], [[3, 4]]], "labels": [[1]]}, "1 lists of labels for 2 lists of points"),
        ({"points": [[641, 2]]}, "lies outside the picture, which is 640 x 427"),
        ({"points": [[1, -0.5]]}, "lies outside"),
        ({"points": [[1, 2]] * 64}, "at most 63 points of an object"),
        ({"points": []}, "object 1 of 1 has no point"),
        ({"box": [1, 2, 1, 5]}, "x0 < x1"),
        ({"box": [1, 2, 5]}, "four numbers"),
        ({"box": [700, 2, 800, 5]}, "lies outside"),
        ({"box": [-9000, 2, 9000, 5]}, "reaches further over the edge"),
        ({"box": [1, 2, 5, None]}, r"four numbers.*got \[1, 2, 5, None\]"),
        ({"box": torch.empty(4, device="meta")}, "four numbers"),
        ({"points": [[1, 2], [3, 4]], "labels": [1, 2]}, "True for what is wanted"),
        ({"points": [[True, False]]}, "points are pairs"),
        ({"points": torch.empty(1, 2, device="meta")}, "points are pairs"),
        ({"points": [[1, 2]], "labels": torch.empty(1, device="meta")}, "labels are True or False"),
        ({"points": [[1, 2]], "labels": [torch.empty((), device="meta")]}, "a label is True"),
        ({"points": [[[1, 2]], []]}, "object 2 of 2 has no point"),
        ({"points": [[1, 2]], "multimask": np.array([True, False])}, "multimask is True or False"),
        ({"points": [[1, 2]], "multimask": None}, "multimask is True or False, got None"),
        ({"box": []}, "list of objects is empty"),
        ({"points": [[1, 2]], "box": [BOX, OTHER_BOX]}, "points of 1, box of 2"),
        ({"mask": [[1.0, 2.0]]}, "32 x 32 numbers within 10000 of 0 for each object, got shape"),
        ({"mask": "mask"}, "32 x 32"),
        ({"mask": np.full((32, 32), np.inf)}, "32 x 32.*got inf to inf"),
        ({"mask": np.full((32, 32), -3e38)}, "32 x 32"),
        ({"mask": np.ones((32, 32), dtype=bool)}, "logits of an earlier answer.*got an array of bool"),
        ({"points": [[1, 2]], "mask": np.zeros((2, 1, 32, 32))}, "points of 1, mask of 2"),
    ],
)
def test_bad_clicks_get_one_sentence(given: dict[str, Any], fact: str, segmenter: Segmenter, encoded: EncodedImage) -> None:
    with pytest.raises(SpecError, match=fact):
        segmenter.click(encoded, **given)


NUMBERS = st.one_of(st.floats(), st.integers(-3, 500), st.sampled_from([3e38, -1e308, 10**400, True, None, "7"]))
PAIR = st.lists(st.integers(0, 400), min_size=2, max_size=2)
PAIRS = st.one_of(st.lists(PAIR, max_size=3), st.lists(st.lists(NUMBERS, min_size=1, max_size=3), max_size=2))
ODD = st.one_of(st.none(), st.booleans(), st.integers(-11, 3), st.floats(), st.text(max_size=4), st.binary(max_size=3))
MASK = st.builds(np.full, st.sampled_from([(32, 32), (1, 32, 32), (2, 32, 32), (32,), (3, 4)]), st.floats(width=32))
ASKED = st.fixed_dictionaries(
    {},
    optional={
        "points": st.one_of(PAIRS, st.lists(st.one_of(PAIRS, st.none()), max_size=3), PAIRS.map(iter), ODD),
        "labels": st.one_of(st.lists(st.booleans(), max_size=3), st.lists(st.lists(ODD, max_size=2), max_size=3), ODD),
        "box": st.one_of(st.sampled_from([BOX, OTHER_BOX, [BOX, None]]), st.lists(NUMBERS, min_size=3, max_size=5), ODD),
        "mask": st.one_of(MASK, st.lists(st.one_of(MASK, st.none()), max_size=2), ODD),
        "multimask": st.one_of(st.booleans(), ODD),
    },
)


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(ASKED)
def test_whatever_is_clicked_has_an_answer_or_a_spec_error(
    segmenter: Segmenter, encoded: EncodedImage, asked: dict[str, Any]
) -> None:
    try:
        found = segmenter.click(encoded, **asked)
    except SpecError as error:
        assert str(error).startswith("run: ") and "\n" not in str(error)
        return
    assert len(found) == len(found.best) * (3 if asked.get("multimask", True) else 1) > 0
    assert np.isfinite(found.scores).all() and np.isfinite(found.logits).all()


@pytest.mark.parametrize("pixels", [np.zeros((1, 1, 3), np.uint8), np.full((30, 40), 900, np.uint16), np.ones((9, 8, 4))])
def test_a_picture_of_any_kind_is_clicked(pixels: np.ndarray, segmenter: Segmenter) -> None:
    """One pixel, 16 bits, transparency; the far edge is part of the picture."""
    height, width = pixels.shape[:2]
    found = segmenter.click(pixels, points=torch.tensor([[0, 0], [width, height]]), labels=np.array([1, 0]))
    assert found.masks.shape == (3, height, width) and found.best.draw().size == (width, height)


def test_a_result_is_one_line_where_it_is_printed(segmenter: Segmenter, encoded: EncodedImage) -> None:
    found = segmenter.click(encoded, points=[[POINT], [AWAY]])
    first = f"object 1 {found.scores[0]:.3f}, object 1 {found.scores[1]:.3f}"
    assert repr(found).startswith(f"<Clicked: 6 masks in 640 x 427 pixels: {first}, ") and repr(found).endswith(", …>")
    assert repr(found.chosen(np.array([], dtype=np.int64))) == "<Clicked: 0 masks in 640 x 427 pixels: none>"
    assert len(repr(encoded)) < 300


def test_the_best_of_each_object(segmenter: Segmenter, encoded: EncodedImage) -> None:
    found = segmenter.click(encoded, points=[[POINT], [AWAY]])
    assert found.top(2).prompt.tolist() == [0, 0, 1, 1] and len(found.top(9)) == 6
    assert (np.diff(found.top(3).scores.reshape(2, 3)) <= 0).all()
    none = found.chosen(np.array([], dtype=np.int64))
    assert len(none.best) == 0 and none.masks.shape == (0, 427, 640)
    for count in (0, -1, "2", None):
        with pytest.raises(SpecError, match="count is a whole number from 1"):
            found.top(count)  # type: ignore[arg-type]


def test_a_pipeline_without_the_head_says_so(tiny_pipeline: Path, picture: Image.Image) -> None:
    segmenter = Segmenter(tiny_pipeline)
    object.__setattr__(segmenter, "manifest", segmenter.manifest.model_copy(update={"clicks": None}))
    assert not segmenter.clickable
    with pytest.raises(ArtifactError, match="without an interactive head"):
        segmenter.click(picture, points=[POINT])
