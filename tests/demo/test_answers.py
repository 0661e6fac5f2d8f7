"""The trained model, exported, finds what is there, nothing where nothing is, and heeds examples and thresholds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3x.demo.held_out import cases
from sam3x.demo.scenes import SIZE, Drawn, Scene, Shape, draw
from sam3x.fidelity.measure import answers_of, figures_of
from sam3x.pipeline.quality import iou
from sam3x.runtime import Result, Segmenter
from sam3x.runtime.segmenter import EncodedImage

# off the quarters, where the cells meet that queries begin in and two of them sometimes answer for one shape
SHAPES = (
    Shape(kind="circle", colour="red", texture="plain", x=0.27, y=0.23, radius=0.2),
    Shape(kind="circle", colour="blue", texture="plain", x=0.77, y=0.27, radius=0.18),
    Shape(kind="star", colour="yellow", texture="plain", x=0.28, y=0.73, radius=0.2),
    Shape(kind="square", colour="green", texture="striped", x=0.73, y=0.77, radius=0.19),
)


@pytest.fixture(scope="module")
def segmenter(demo_pipeline: Path) -> Segmenter:
    return Segmenter(demo_pipeline, threads=1)


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return draw(Scene(shapes=SHAPES), 2 * SIZE)


@pytest.fixture(scope="module")
def encoded(segmenter: Segmenter, drawn: Drawn) -> EncodedImage:
    return segmenter.encode(drawn.pixels)


def found(result: Result, drawn: Drawn) -> list[int]:
    """Which shape each mask is, in order."""
    shapes = []
    for mask in result.masks:
        overlaps = [iou(mask, own) for own in drawn.masks]
        assert max(overlaps) > 0.75, overlaps
        shapes.append(int(np.argmax(overlaps)))
    return sorted(shapes)


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("circle", [0, 1]),
        ("circles", [0, 1]),
        ("red circle", [0]),
        ("yellow shape", [2]),
        ("striped square", [3]),
        ("shape", [0, 1, 2, 3]),
        ("cross", []),
        ("red star", []),
        ("dog", []),
    ],
)
def test_words_find_all_that_they_mean_and_nothing_else(
    text: str, shapes: list[int], segmenter: Segmenter, encoded: EncodedImage, drawn: Drawn
) -> None:
    assert found(segmenter.segment(encoded, text), drawn) == shapes


def test_prompts_are_answered_each_on_its_own(segmenter: Segmenter, encoded: EncodedImage, drawn: Drawn) -> None:
    result = segmenter.segment(encoded, ["dog", "circle", "star"])
    assert result.labels.count("circle") == 2 and result.labels.count("star") == 1 and "dog" not in result.labels


def test_a_box_is_an_example_of_what_is_wanted(segmenter: Segmenter, encoded: EncodedImage, drawn: Drawn) -> None:
    for index in range(len(SHAPES)):
        assert found(segmenter.segment(encoded, boxes=[drawn.boxes[index]]), drawn) == [index]


def test_a_negative_box_takes_its_like_away(segmenter: Segmenter, encoded: EncodedImage, drawn: Drawn) -> None:
    result = segmenter.segment(encoded, "circle", boxes=[drawn.boxes[0]], labels=[False])
    assert found(result, drawn) == [1]


def test_a_higher_threshold_finds_some_of_the_same(segmenter: Segmenter, encoded: EncodedImage) -> None:
    own = segmenter.segment(encoded, "shape")
    middle = float(np.sort(own.scores)[1:3].mean())
    fewer = segmenter.segment(encoded, "shape", threshold=middle)
    assert len(own) == 4 and len(fewer) == 2 and set(fewer.scores.tolist()) <= set(own.scores.tolist())
    assert len(segmenter.segment(encoded, "shape", threshold=1.0)) == 0
    assert len(segmenter.segment(encoded, "shape", threshold=0.0)) > 4


def test_held_out_pictures_have_the_published_figures(segmenter: Segmenter) -> None:
    some = cases(40)
    figures = figures_of(some, answers_of(segmenter, some), segmenter.manifest.threshold)
    assert figures.box_ap50 is not None and figures.mask_iou is not None and figures.false_alarms is not None
    assert figures.box_ap50 > 0.85 and figures.mask_iou > 0.85 and figures.false_alarms < 0.1


def test_a_picture_of_another_size_has_the_same_answers(segmenter: Segmenter, drawn: Drawn) -> None:
    small = Image.fromarray(drawn.pixels).resize((SIZE, SIZE), Image.Resampling.BOX)
    first, second = (segmenter.segment(picture, "circle") for picture in (drawn.pixels, small))
    assert len(first) == len(second) == 2
    np.testing.assert_allclose(first.boxes, 2 * second.boxes, atol=4)
