"""Resizing as torch does it, in numpy: pictures of 8-bit values bit for bit, maps of floats up to rounding."""

from __future__ import annotations

import numpy as np


def resize_picture(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 → (height, width, 3) uint8, bilinear with antialiasing.

    What ``torchvision.transforms.v2.Resize`` gives on x86: the integer arithmetic of ATen's UpSampleKernelAVXAntialias.h, which
    keeps 8-bit values between the passes and weights in 16 bits. Pillow keeps 22 and is off by 1 here and there.
    """
    return _filtered(_filtered(pixels, width, 1), height, 0)


def _filtered(pixels: np.ndarray, size: int, axis: int) -> np.ndarray:
    have = pixels.shape[axis]
    if have == size:
        return pixels
    starts, weights, bits = _integer_weights(have, size)
    lines = np.moveaxis(pixels, axis, 0)
    total = np.full((size, *lines.shape[1:]), 1 << (bits - 1), dtype=np.int32)
    for tap in range(weights.shape[1]):
        at = np.minimum(starts + tap, have - 1)  # weights beyond a window are 0
        total += lines[at].astype(np.int32) * weights[:, tap].reshape(-1, *[1] * (lines.ndim - 1))
    return np.moveaxis(np.clip(total >> bits, 0, 255).astype(np.uint8), 0, axis)


def _integer_weights(have: int, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """First source pixel of each output, its weights (size, taps) as integers, and how many bits they are shifted by."""
    scale = have / size
    support = max(scale, 1.0)
    centre = scale * (np.arange(size) + 0.5)
    starts = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    counts = np.minimum((centre + support + 0.5).astype(np.int64), have) - starts
    taps = np.arange(counts.max())
    distance = (taps + starts[:, None] - centre[:, None] + 0.5) / support
    weights = np.where(taps < counts[:, None], np.maximum(1 - np.abs(distance), 0), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    bits = next((bits for bits in range(22) if int(0.5 + weights.max() * (1 << (bits + 1))) >= 1 << 15), 22)
    return starts, (0.5 + weights * (1 << bits)).astype(np.int32), bits


def resize_bilinear(maps: np.ndarray, height: int, width: int, rows: slice | None = None) -> np.ndarray:
    """(N, h, w) float32 → (N, height, width), as ``torch.nn.functional.interpolate`` (bilinear, align_corners=False).

    Args:
        rows: give these rows of the result alone, the same numbers.
    """
    return _interpolated(_interpolated(maps, height, 1, rows), width, 2)


def _interpolated(maps: np.ndarray, size: int, axis: int, part: slice | None = None) -> np.ndarray:
    have = maps.shape[axis]
    wanted = np.arange(size, dtype=np.float32)[part or slice(None)]
    at = np.maximum((wanted + np.float32(0.5)) * np.float32(have / size) - np.float32(0.5), 0)
    low = np.minimum(at.astype(np.int64), have - 1)
    high = np.minimum(low + 1, have - 1)
    share = (at - low).astype(np.float32).reshape((-1, 1) if axis == 1 else (1, -1))
    below, above = np.take(maps, low, axis=axis), np.take(maps, high, axis=axis)
    above -= below
    above *= share
    above += below
    return above
