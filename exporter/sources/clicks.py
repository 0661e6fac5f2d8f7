"""How a source turns the interactive head's logits into masks; imports no torch, as the manifest holds it too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Clicks:
    """Say how many rows stand for no point, and how logits are clipped, thresholded and cleaned of holes and specks.

    Attributes:
        mask_threshold: logits above it are part of a mask.
        max_hole_area, max_sprinkle_area: holes and specks of as many pixels of the low resolution are filled and removed before
            a mask is stretched; 0: none.
        rows_of_mask_alone: rows of label -1 that stand for no point and no box.
        largest_logit: within which logits are kept that are fed back; None: as they are.
    """

    mask_threshold: float
    max_hole_area: float
    max_sprinkle_area: float
    rows_of_mask_alone: int
    largest_logit: float | None = 32.0
