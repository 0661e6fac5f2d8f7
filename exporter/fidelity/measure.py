"""A pipeline's answers to every case, what they are worth, and how far they are from another pipeline's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sam3x.fidelity.cases import Case
from sam3x.fidelity.score import Answers, Asked, Figures, encode, mask_ious, pairs, score
from sam3x.runtime.segmenter import Segmenter

FAINT = 0.02
"""Answers that score below it change COCO's average precision by nothing worth the time of their masks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """Answers against those of a reference, of everything that the reference found above the threshold.

    Attributes:
        mask_iou, worst_iou: mean and least mask IoU of what both found; what was not found again counts 0.
        lost, gained: how many of the reference's were not found again, and how many were found that it has not.
        score: largest difference of a score, of what both found.
    """

    mask_iou: float | None
    worst_iou: float | None
    lost: int
    gained: int
    score: float


def answers_of(segmenter: Segmenter, cases: Sequence[Case], tell: Callable[[str], None] = lambda _: None) -> list[Answers]:
    """What ``segmenter`` finds, a prompt after the other in the order of ``cases``."""
    found: list[Answers] = []
    for index, case in enumerate(cases):
        if index % 50 == 0:
            tell(f"picture {index + 1} of {len(cases)}")
        texts = [item.phrase for item in case.asked]
        result = segmenter.segment(case.opened(), text=texts, threshold=FAINT, max_detections=100)
        masks = encode(result.masks)
        for prompt in range(len(texts)):
            rows = np.flatnonzero(result.prompt == prompt)
            found.append(Answers(scores=result.scores[rows], boxes=result.boxes[rows], masks=[masks[row] for row in rows]))
    return found


def figures_of(cases: Sequence[Case], answers: Sequence[Answers], threshold: float) -> Figures:
    """``score`` of all that was asked."""
    return score(asked_of(cases), answers, threshold)


def asked_of(cases: Sequence[Case]) -> list[Asked]:
    """Every prompt of every picture, in order."""
    return [item for case in cases for item in case.asked]


def against(reference: Sequence[Answers], answers: Sequence[Answers], threshold: float) -> Against:
    """How far ``answers`` are from those of ``reference``, both in the same order."""
    overlaps: list[float] = []
    lost = gained = 0
    difference = 0.0
    for old, new in zip(reference, answers, strict=True):
        first, second = (np.flatnonzero(item.scores > threshold) for item in (old, new))
        shared = mask_ious([old.masks[row] for row in first], [new.masks[row] for row in second])
        both = pairs(shared)
        overlaps += [*(float(shared[pair]) for pair in both), *[0.0] * (len(first) - len(both))]
        lost, gained = lost + len(first) - len(both), gained + len(second) - len(both)
        for row, column in both:
            difference = max(difference, abs(float(old.scores[first[row]]) - float(new.scores[second[column]])))
    return Against(
        mask_iou=float(np.mean(overlaps)) if overlaps else None,
        worst_iou=min(overlaps, default=None),
        lost=lost,
        gained=gained,
        score=difference,
    )
