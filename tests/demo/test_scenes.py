"""Pictures of shapes: what is drawn is where it is said to be, and words mean what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam3x.demo.held_out import PROMPTS, cases, held_out
from sam3x.demo.questions import BOXES_ALONE, alike, left_out, meant, phrases, questions
from sam3x.demo.scenes import COLOURS, KINDS, LEFT_OUT, OTHER, SIZE, Scene, Shape, draw, scene

SEEDS = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_masks_are_the_visible_parts_and_boxes_hold_them(seed: int) -> None:
    made = scene(np.random.default_rng(seed))
    drawn = draw(made, SIZE)
    assert drawn.pixels.shape == (SIZE, SIZE, 3) and drawn.pixels.dtype == np.uint8
    assert drawn.coverage.min() >= 0 and drawn.coverage.sum(axis=0).max() <= 1 + 1e-5  # the front hides the back
    for shape, mask, box in zip(made.shapes, drawn.masks, drawn.boxes, strict=True):
        rows, columns = np.nonzero(mask)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert mask.sum() > 0.25 * (shape.radius * SIZE) ** 2  # a fair part of every shape is seen
        assert np.hypot(columns + 0.5 - shape.x * SIZE, rows + 0.5 - shape.y * SIZE).max() < shape.radius * SIZE + 1


def test_a_scene_is_the_same_in_every_size() -> None:
    made = scene(np.random.default_rng(4))
    small, large = draw(made, SIZE), draw(made, 3 * SIZE)
    shrunk = large.coverage.reshape(-1, SIZE, 3, SIZE, 3).mean(axis=(2, 4))
    assert np.abs(shrunk - small.coverage).mean() < 0.003


def test_a_shape_has_the_colour_of_its_name() -> None:
    for kind in KINDS:
        for colour, value in COLOURS.items():
            drawn = draw(Scene(shapes=(Shape(kind=kind, colour=colour, texture="plain", x=0.5, y=0.5, radius=0.2),)), SIZE)
            assert drawn.pixels[drawn.coverage[0] == 1].mean(axis=0) == pytest.approx(value, abs=0.5)


def test_training_never_draws_what_is_left_out_and_the_held_out_set_does() -> None:
    def looks(scenes: list[Scene]) -> set[tuple[str, str]]:
        return {(shape.colour, shape.kind) for made in scenes for shape in made.shapes}

    training = [scene(np.random.default_rng(seed), other=0.3) for seed in range(300)]
    assert not looks(training) & LEFT_OUT
    rng = np.random.default_rng(0)
    texts = [question.text for made in training for question in questions(rng, made, 4)]
    assert not [text for text in texts if left_out(text)]
    assert left_out("red star") and left_out("striped red stars") and not left_out("red circle") and not left_out("star")
    assert looks([held_out(index).scene for index in range(60)]) >= LEFT_OUT


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_questions_have_their_right_answers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = scene(rng)
    for question in questions(rng, made, 8):
        assert len(question.examples) == len(question.labels)
        wanted = [index for index, label in zip(question.examples, question.labels, strict=True) if label]
        others = [index for index, label in zip(question.examples, question.labels, strict=True) if not label]
        assert set(wanted) <= set(question.wanted) and not set(others) & set(question.wanted)
        if not question.examples:
            assert question.wanted == meant(made, question.text)
        elif question.text == BOXES_ALONE:
            assert question.wanted == alike(made, question.examples[0])


def test_words_mean_what_fits_all_of_them() -> None:
    common = {"x": 0.5, "y": 0.5, "radius": 0.2}
    shapes = (
        Shape(kind="star", colour="red", texture="striped", **common),
        Shape(kind="star", colour="blue", texture="plain", **common),
        Shape(kind="cross", colour="red", texture="plain", **common),
    )
    made = Scene(shapes=shapes)
    answers = {
        "star": (0, 1), "red star": (0,), "red shape": (0, 2), "striped star": (0,), "shapes": (0, 1, 2), "crosses": (2,),
        "blue cross": (), "dog": (), "red dog": (), "plain red cross": (2,),
    }  # fmt: skip
    assert {text: meant(made, text) for text in answers} == answers


def test_the_held_out_set_asks_for_what_is_there_and_what_is_not() -> None:
    some = cases(20)
    asked = [item for case in some for item in case.asked]
    assert len(asked) == 20 * PROMPTS and {item.phrase for item in asked} <= set(phrases())
    empty = sum(not len(item.boxes) for item in asked)
    assert 0.4 * len(asked) < empty < 0.65 * len(asked)
    assert max(len(item.boxes) for item in asked) > 1
    for first, second in zip(some, cases(20), strict=True):
        np.testing.assert_array_equal(first.picture, second.picture)


def test_colours_without_a_name_are_far_from_those_with_one() -> None:
    rng = np.random.default_rng(1)
    shapes = [shape for _ in range(60) for shape in scene(rng, other=0.5).shapes if shape.colour == OTHER]
    assert len(shapes) > 40
    for shape in shapes:
        assert min(np.linalg.norm(np.subtract(shape.tint, value)) for value in COLOURS.values()) > 75
        assert not meant(Scene(shapes=(shape,)), OTHER) and meant(Scene(shapes=(shape,)), shape.kind) == (0,)
