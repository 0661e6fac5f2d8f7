"""Clicks as people give them, read and checked before a picture is encoded, and as the interactive head takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sam3x.errors import SpecError
from sam3x.runtime.prompts import check_box, items_of, read_labels, refused, short
from sam3x.sources.names import PADDING

_POINTS = "points are pairs x, y in pixels, a list of them for one object or a list of lists for several"
_BOX = "a box is four numbers x0, y0, x1, y1 in pixels with x0 < x1 and y0 < y1"
_MOST_LOGIT = 1e4  # upstream's are within 32; far beyond, products of the head overflow
_CORNERS, _NONE = (2, 3), -1
"""Labels of the interactive head; a point of the object has 1, one outside 0."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Click:
    """One object, in pixels of a picture that is not known yet.

    Attributes:
        points: (N, 2) float64, x and y. labels: (N,) int64, 1 for a point of the object, 0 for one outside.
        box: (2, 2) float64, its corners, or None. mask: (h, w) float32 logits of an earlier answer, or None.
    """

    points: np.ndarray
    labels: np.ndarray
    box: np.ndarray | None
    mask: np.ndarray | None

    def rows(self, alone: int) -> int:
        """Rows of the head's points: corners, points and one of none; ``alone`` of none where there is but a mask."""
        count = len(self.points) + (0 if self.box is None else 2)
        return count + 1 if count else alone


def read_clicks(points: Any, labels: Any, box: Any, mask: Any, *, mask_size: Sequence[int]) -> tuple[Click, ...]:
    """The objects of ``Segmenter.click``, which says what each argument may be.

    Args:
        mask_size: height and width of a mask that is fed back.

    Raises:
        SpecError: nothing is given, a value of another kind, or lists that do not fit together.
    """
    own_points, own_labels = _points(points, labels)
    given = {"points": own_points, "box": _boxes(box), "mask": _masks(mask, tuple(mask_size))}
    counts = {name: len(items) for name, items in given.items() if items is not None}
    if not counts:
        raise refused("nothing is clicked", "Give points, a box or a mask.")
    if len(set(counts.values())) > 1:
        words = ", ".join(f"{name} of {count}" for name, count in counts.items())
        raise refused(f"the objects do not fit together: {words}", "Give each for every object, None where there is none.")
    count = next(iter(counts.values()))
    if not count:
        raise refused("the list of objects is empty")
    none = [None] * count
    clicks = tuple(
        Click(points=at, labels=label, box=corners, mask=logits)
        for at, label, corners, logits in zip(
            own_points or [np.zeros((0, 2))] * count,
            own_labels or [np.zeros(0, dtype=np.int64)] * count,
            given["box"] or none,
            given["mask"] or none,
            strict=True,
        )
    )
    for index, click in enumerate(clicks):
        if not len(click.points) and click.box is None and click.mask is None:
            raise refused(f"object {index + 1} of {count} has no point, no box and no mask")
    return clicks


def check_inside(clicks: Sequence[Click], width: int, height: int) -> None:
    """Refuse a point outside the picture, and a box that has no part in it or reaches far over its edge.

    Raises:
        SpecError: naming it.
    """
    for click in clicks:
        outside = (click.points < 0).any(axis=1) | (click.points > (width, height)).any(axis=1)
        if outside.any():
            point = click.points[outside][0].tolist()
            raise refused(f"the point {point} lies outside the picture, which is {width} x {height} pixels")
        if click.box is not None:
            check_box(click.box.ravel(), height, width)


def to_arrays(
    clicks: Sequence[Click], picture_size: tuple[int, int], image_size: int, mask_size: Sequence[int], alone: int
) -> dict[str, np.ndarray]:
    """The interactive head's inputs; objects of fewer rows than another are padded.

    Args:
        picture_size: width and height. image_size: side of the square that the model sees; points are in its pixels.
        alone: see ``Click.rows``.
    """
    rows = [click.rows(alone) for click in clicks]
    count, longest = len(clicks), max(1, *rows)
    coords = np.zeros((count, longest, 2), dtype=np.float32)
    labels = np.where(np.arange(longest) < np.array(rows)[:, None], _NONE, PADDING)
    masks = np.zeros((count, 1, *mask_size), dtype=np.float32)
    for row, click in enumerate(clicks):
        corners = np.zeros((0, 2)) if click.box is None else click.box
        at = np.concatenate([corners, click.points]).astype(np.float32)
        coords[row, : len(at)] = at / np.array(picture_size, dtype=np.float32) * np.float32(image_size)
        labels[row, : len(at)] = [*_CORNERS[: len(corners)], *click.labels]
        if click.mask is not None:
            masks[row, 0] = click.mask
    return {
        "point_coords": coords,
        "point_labels": labels,
        "mask_input": masks,
        "has_mask_input": np.array([click.mask is not None for click in clicks]),
    }


def _points(points: Any, labels: Any) -> tuple[list[np.ndarray] | None, list[np.ndarray] | None]:
    """Points (N, 2) and labels (N,) of every object; None without points."""
    if points is None:
        if labels is not None:
            raise refused("labels without points", "Give a point for each.")
        return None, None
    items = items_of(points, _POINTS)
    nested = bool(items) and not _is_pair(items[0])
    objects = [_pairs(item, points) for item in items] if nested else [_pairs(items, points)]
    return objects, read_labels(labels, [len(item) for item in objects], nested, each="points")


def _is_pair(item: Any) -> bool:
    array = _array(item)
    return array is not None and array.shape == (2,)


def _pairs(items: Any, given: Any) -> np.ndarray:
    """(N, 2) float64 of one object's points; None and an empty list are none."""
    if items is None:
        return np.zeros((0, 2))
    array = _array(items)
    if array is not None and array.shape in ((0,), (0, 2)):
        return np.zeros((0, 2))
    if array is None or array.ndim != 2 or array.shape[1] != 2 or not np.isfinite(array).all():
        raise refused(f"{_POINTS}, got {short(given)}")
    return array


def _boxes(box: Any) -> list[np.ndarray | None] | None:
    """Corners (2, 2) of every object's box."""
    if box is None:
        return None
    items = items_of(box, f"{_BOX}, or a list of them")
    if any(np.isscalar(item) or getattr(item, "ndim", None) == 0 for item in items):  # one box
        items = [items]
    found: list[np.ndarray | None] = []
    for item in items:
        array = None if item is None else _array(item)
        if item is not None and (array is None or array.shape != (4,) or not _is_box(array)):
            raise refused(f"{_BOX}, got {short(item)}")
        found.append(None if array is None else array.reshape(2, 2))
    return found


def _is_box(array: np.ndarray) -> bool:
    return bool(np.isfinite(array).all() and (array[2:] > array[:2]).all())


def _masks(mask: Any, size: tuple[int, ...]) -> list[np.ndarray | None] | None:
    """Logits (h, w) of every object's mask."""
    if mask is None:
        return None
    if isinstance(mask, (list, tuple)) and any(item is None for item in mask):
        return [None if item is None else _one_mask(item, size) for item in mask]
    array = _array(mask)
    if array is None or array.ndim not in (2, 3, 4):
        raise _no_mask(mask, size)
    return [_one_mask(item, size) for item in (array[None] if array.ndim == 2 else array)]


def _one_mask(item: Any, size: tuple[int, ...]) -> np.ndarray:
    array = _array(item)
    if array is None or array.shape not in (size, (1, *size)) or not (np.abs(array) <= _MOST_LOGIT).all():
        raise _no_mask(item, size)
    return array.reshape(size).astype(np.float32)


def _no_mask(value: Any, size: tuple[int, ...]) -> SpecError:
    array = _array(value)
    if array is None:
        found = f"an array of {value.dtype}" if hasattr(value, "dtype") else short(value)
    elif array.shape in (size, (1, *size)):
        found = f"{array.min():g} to {array.max():g}"
    else:
        found = f"shape {list(array.shape)}"
    numbers = f"{size[0]} x {size[1]} numbers within {_MOST_LOGIT:g} of 0"
    fact = f"a mask is the logits of an earlier answer, {numbers} for each object, got {found}"
    return refused(fact, "Give result.best.logits.")


def _array(value: Any) -> np.ndarray | None:
    """``value`` as float64; None where it is no array of numbers."""
    try:
        value = value.detach().cpu() if hasattr(value, "detach") else value  # a torch tensor
        array = np.asarray(value)
        with np.errstate(over="ignore"):  # of a longer float
            return array.astype(np.float64) if array.dtype.kind in "iuf" or not array.size else None
    except Exception:  # lists of different lengths, a tensor that has no values here, another library's own refusal
        return None
