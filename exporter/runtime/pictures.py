"""Pictures to tensors and masks to pixels, as upstream's ``Sam3Processor`` does it, in numpy and Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3x.errors import SpecError, Step, TargetUnavailableError
from sam3x.runtime.resize import resize_picture

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

INSTALL = 'Install it: pip install "sam3x[runtime]"'


def open_picture(source: Any) -> Image.Image:
    """An RGB picture from a path, a ``PIL.Image.Image`` or a uint8 array (H, W, 3).

    A file is turned as its EXIF orientation says, so that masks fit the picture as viewers show it.

    Raises:
        SpecError: it cannot be read as a picture.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise TargetUnavailableError("reading pictures needs Pillow", remedy=INSTALL, step=Step.RUN) from None
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise SpecError(f"expected a uint8 array (H, W, 3), got {source.dtype} {list(source.shape)}", step=Step.RUN)
        return Image.fromarray(source)
    path = Path(source)
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError, SyntaxError) as error:
        fact = getattr(error, "strerror", None) or str(error).replace(str(path), "the file").rstrip(".")
        raise SpecError(
            f"{path} cannot be read as a picture ({fact})", remedy="Give a JPEG, PNG or WebP file.", step=Step.RUN
        ) from error


def to_tensor(picture: Image.Image, size: int, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(1, 3, size, size) float32: squeezed to a square, bilinear with antialiasing on 8-bit values, normalized."""
    values: np.ndarray = resize_picture(np.asarray(picture), size, size).astype(np.float32) / np.float32(255)
    values = (values - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


def sigmoid(values: np.ndarray) -> np.ndarray:
    """The logistic function, without overflow."""
    return np.where(values >= 0, 1 / (1 + np.exp(-np.abs(values))), 1 - 1 / (1 + np.exp(-np.abs(values)))).astype(np.float32)


def boxes_to_pixels(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, 4) of (cx, cy, w, h) as fractions → (N, 4) of (x0, y0, x1, y1) in pixels."""
    centre, half = boxes[:, :2], boxes[:, 2:] * np.float32(0.5)
    scale = np.array([width, height, width, height], dtype=np.float32)
    return np.concatenate([centre - half, centre + half], axis=1) * scale


def boxes_to_fractions(boxes: Any, height: int, width: int) -> np.ndarray:
    """(N, 4) of (x0, y0, x1, y1) in pixels → (N, 4) of (cx, cy, w, h) as fractions of the picture.

    Raises:
        SpecError: not four numbers a box, or a box without an area.
    """
    try:
        given = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    except (TypeError, ValueError):
        raise SpecError(f"expected boxes of four numbers x0, y0, x1, y1 in pixels, got {boxes!r}", step=Step.RUN) from None
    if not np.isfinite(given).all() or (given[:, 2:] <= given[:, :2]).any():
        raise SpecError(f"a box is x0, y0, x1, y1 in pixels with x0 < x1 and y0 < y1, got {given.tolist()}", step=Step.RUN)
    scale = np.array([width, height, width, height], dtype=np.float32)
    low, high = given[:, :2], given[:, 2:]
    return np.concatenate([(low + high) / 2, high - low], axis=1) / scale
