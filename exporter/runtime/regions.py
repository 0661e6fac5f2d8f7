"""Holes and specks of masks, as upstream's predictors fill and remove them before a mask is stretched."""

from __future__ import annotations

import numpy as np


def mended(masks: np.ndarray, threshold: float, max_hole_area: float, max_sprinkle_area: float) -> np.ndarray:
    """Mask logits (N, h, w) with small holes at ``threshold`` + 10 and small specks at ``threshold`` - 10.

    What ``SAM2Transforms.postprocess_masks`` of sam3 0.1.4 does where it can count connected pixels.

    Args:
        max_hole_area, max_sprinkle_area: most pixels of a hole, of a speck; 0: those are left.
    """
    given = masks
    if max_hole_area > 0:
        masks = np.where(small_regions(given <= threshold, max_hole_area), np.float32(threshold + 10), masks)
    if max_sprinkle_area > 0:
        masks = np.where(small_regions(given > threshold, max_sprinkle_area), np.float32(threshold - 10), masks)
    return masks


def small_regions(flags: np.ndarray, most: float) -> np.ndarray:
    """(N, h, w) bool, True in regions of ``flags`` of at most ``most`` pixels; corners connect, as in skimage's ``label``."""
    count, height, width = flags.shape
    padded = np.zeros((count, height + 1, width + 2), dtype=np.int8)  # an empty row and two columns between what must not touch
    padded[:, :height, 1:-1] = flags
    steps, row = np.diff(padded.ravel(), prepend=np.int8(0)), width + 2
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    first, last = np.searchsorted(ends, starts + row), np.searchsorted(starts, ends + row, side="right")
    touching = np.maximum(last - first, 0)  # runs of the next row, each with a pixel below or beside one of this run's
    above = np.repeat(np.arange(len(starts)), touching)
    below = np.arange(len(above)) - np.repeat(np.cumsum(touching) - touching, touching) + np.repeat(first, touching)
    region = _joined(len(starts), above, below)
    area = np.bincount(region, weights=ends - starts, minlength=len(starts))[region]
    edges = np.zeros(padded.size + 1, dtype=np.int8)
    edges[starts[area <= most]] = 1
    edges[ends[area <= most]] -= 1
    return np.cumsum(edges[:-1], dtype=np.int8).reshape(padded.shape)[:, :height, 1:-1].astype(bool)


def _joined(count: int, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The least number of every group of ``count`` things, of which ``above`` and ``below`` belong together."""
    found = np.arange(count)
    while True:
        lower, earlier = np.minimum(found[above], found[below]), found.copy()
        np.minimum.at(found, earlier[above], lower)
        np.minimum.at(found, earlier[below], lower)
        found = found[found]
        if np.array_equal(found, earlier):
            return found
