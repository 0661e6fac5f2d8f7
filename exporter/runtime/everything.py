"""Masks of everything: a grid of points, and which of their masks are kept, as by SAM's automatic mask generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sam3x.runtime.clicks import Click
from sam3x.runtime.prompts import fraction
from sam3x.runtime.result import Clicked


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Which masks stay; fields as in SAM's generator.

    Attributes:
        pred_iou_thresh: scores are above it. stability_score_thresh: stability scores are.
        stability_score_offset: logits by which the border of a mask moves in and out for its stability score.
        box_nms_thresh: of two masks whose boxes overlap by more (IoU), the one that scores higher stays.

    Raises:
        SpecError: a threshold outside 0 to 1, or an offset that is no number from 0.
    """

    pred_iou_thresh: float
    stability_score_thresh: float
    stability_score_offset: float
    box_nms_thresh: float

    def __post_init__(self) -> None:
        for name in ("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh"):
            fraction(getattr(self, name), name)
        fraction(self.stability_score_offset, "stability_score_offset", most=float("inf"))

    def stable(self, found: Clicked) -> np.ndarray:
        """Indices of the masks that score high enough and whose area hardly depends on where the border is."""
        high = np.flatnonzero(found.scores > self.pred_iou_thresh)
        return high[[found.stability_score(i, self.stability_score_offset) > self.stability_score_thresh for i in high]]

    def distinct(self, found: Clicked) -> np.ndarray:
        """Indices of the masks that non-maximum suppression leaves, best first."""
        return suppressed(found.boxes - np.array([0, 0, 1, 1], dtype=np.float32), found.scores, self.box_nms_thresh)


def grid(points_per_side: int, width: int, height: int) -> list[Click]:
    """An object for each of ``points_per_side`` squared points, evenly spaced over the picture, row by row."""
    at = (np.arange(points_per_side) + 0.5) / points_per_side
    one = np.ones(1, dtype=np.int64)
    return [Click(points=np.array([[x * width, y * height]]), labels=one, box=None, mask=None) for y in at for x in at]


def suppressed(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Indices, best first, of the boxes (N, 4) of which none that scores higher overlaps by more than ``threshold``.

    What ``torchvision.ops.nms`` gives.
    """
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    left, kept = np.argsort(-scores, kind="stable"), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        low, high = np.maximum(boxes[best, :2], boxes[left, :2]), np.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = (high - low).clip(0).prod(axis=1)
        with np.errstate(invalid="ignore"):  # two boxes without area
            left = left[~(shared / (area[best] + area[left] - shared) > np.float64(threshold))]
    return np.array(kept, dtype=np.int64)
