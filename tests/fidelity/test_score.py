"""Figures against answers whose worth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sam3x.fidelity.measure import against
from sam3x.fidelity.report import Contender, loses, markdown
from sam3x.fidelity.score import Answers, Asked, Figures, encode, mask_ious, pairs, score

SIZE = (40, 60)


def square(x: int, y: int, side: int = 10) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def asked(picture: int, phrase: str, *corners: tuple[int, int]) -> Asked:
    boxes = np.array([[x, y, x + 10, y + 10] for x, y in corners], dtype=np.float32).reshape(-1, 4)
    masks = encode(np.array([square(*corner) for corner in corners]).reshape(-1, *SIZE))
    return Asked(picture=picture, phrase=phrase, size=SIZE, boxes=boxes, masks=masks, crowd=np.zeros(len(boxes), dtype=bool))


def answers(*found: tuple[float, int, int]) -> Answers:
    """Squares of side 10 with their scores."""
    own = asked(0, "", *((x, y) for _, x, y in found))
    return Answers(scores=np.array([value for value, *_ in found]), boxes=own.boxes, masks=own.masks)


QUESTIONS = [asked(1, "dog", (0, 0), (20, 20)), asked(1, "cat"), asked(2, "dog", (30, 5)), asked(2, "cat", (5, 5))]
RIGHT = [answers((0.9, 0, 0), (0.8, 20, 20)), answers(), answers((0.7, 30, 5)), answers((0.6, 5, 5))]


def test_right_answers_have_full_marks() -> None:
    found = score(QUESTIONS, RIGHT, 0.5)
    assert found == Figures(
        box_ap50=1.0, mask_ap50=1.0, mask_iou=1.0, recall=1.0, precision=1.0, false_alarms=0.0, pictures=2, prompts=4, objects=4
    )


def test_no_answer_has_none() -> None:
    found = score(QUESTIONS, [answers()] * 4, 0.5)
    assert (found.box_ap50, found.mask_ap50, found.recall, found.false_alarms) == (0.0, 0.0, 0.0, 0.0)
    assert found.mask_iou is None and found.precision is None


def test_a_lost_object_a_false_alarm_and_a_moved_mask_each_have_their_figure() -> None:
    moved = answers((0.7, 32, 5))  # 8 of 12 columns are common
    found = score(QUESTIONS, [answers((0.9, 0, 0)), answers((0.6, 3, 3)), moved, RIGHT[3]], 0.5)
    assert found.recall == pytest.approx(3 / 4) and found.precision == pytest.approx(3 / 4) and found.false_alarms == 1.0
    assert found.mask_iou == pytest.approx((1 + 8 / 12 + 1) / 3)
    # dog: two of three found, all right: 67 of 101 recalls; cat: the false alarm scores as high as the hit
    assert found.box_ap50 == pytest.approx((67 / 101 + 0.5) / 2, abs=1e-3)


def test_faint_answers_count_for_average_precision_alone() -> None:
    faint = [replace(item, scores=item.scores * 0.1) for item in RIGHT]
    found = score(QUESTIONS, faint, 0.5)
    assert found.box_ap50 == 1.0 and found.recall == 0.0 and found.mask_iou is None and found.precision is None


def test_what_is_not_wanted_of_a_crowd_is_no_loss() -> None:
    crowd = replace(QUESTIONS[0], crowd=np.array([False, True]))
    found = score([crowd], [answers((0.9, 0, 0))], 0.5)
    assert found.box_ap50 == pytest.approx(1) and found.recall == 1.0
    inside = score([crowd], [answers((0.9, 0, 0), (0.8, 21, 20), (0.8, 40, 0), (0.7, 1, 0))], 0.5)
    assert inside.precision == pytest.approx(1 / 3)  # of a hit, one that hits nothing and one that hits the same again


def test_hits_are_one_to_one() -> None:
    assert pairs(np.array([[0.9, 0.8], [0.85, 0.6]])) == [(0, 0), (1, 1)]
    assert pairs(np.array([[0.8], [0.9]])) == [(1, 0)] and pairs(np.array([[0.4]])) == []
    assert pairs(np.zeros((0, 3))) == []


def test_two_pipelines_are_compared_prompt_by_prompt() -> None:
    same = against(RIGHT, RIGHT, 0.5)
    assert (same.mask_iou, same.worst_iou, same.lost, same.gained, same.score) == (1.0, 1.0, 0, 0, 0.0)
    other = [answers((0.85, 0, 0)), answers((0.9, 3, 3)), answers((0.75, 32, 5)), answers((0.6, 5, 5))]
    found = against(RIGHT, other, 0.5)
    assert (found.lost, found.gained, found.worst_iou) == (1, 1, 0.0)
    assert found.mask_iou == pytest.approx((2 + 8 / 12) / 4) and found.score == pytest.approx(0.05)


def test_overlaps_of_nothing() -> None:
    assert mask_ious([], RIGHT[0].masks).shape == (0, 2) and encode(np.zeros((0, *SIZE), dtype=bool)) == []


def test_a_page_marks_what_loses_a_point() -> None:
    best = score(QUESTIONS, RIGHT, 0.5)
    first = Contender(name="onnx fp32", megabytes=5.0, figures=best, against=None)
    worse = Contender(
        name="onnx int8", megabytes=2.0, figures=replace(best, mask_ap50=0.98), against=against(RIGHT, RIGHT, 0.5)
    )
    near = replace(worse, name="onnx fp16", figures=replace(best, mask_ap50=0.995))
    assert loses(worse, first) and not loses(near, first) and not loses(first, first)
    page = markdown([first, near, worse], "sam3x fidelity", "coco.json")
    assert "| onnx int8 | 1.000 * | 0.980 |" in page and "(onnx int8)" in page and "`sam3x fidelity`" in page
