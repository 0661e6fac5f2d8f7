"""Prompts as people give them, read and checked before a picture is encoded."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from sam3x.errors import SpecError, Step


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """One question to the model.

    Attributes:
        name: its words, ``ids [...]`` or ``boxes``. ids: its tokens.
        boxes: (N, 4) float64, x0, y0, x1, y1 in pixels of a picture that is not known yet.
        labels: (N,) int64, 1 for an example of what is wanted, 0 for one of what is not.
        threshold: detections score above it.
    """

    name: str
    ids: Sequence[int]
    boxes: np.ndarray
    labels: np.ndarray
    threshold: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a pipeline takes: tokens of a text, ids below ``vocab_size``, boxes of a prompt."""

    context_length: int
    vocab_size: int
    boxes: int


def read_prompts(
    text: Any,
    boxes: Any,
    labels: Any,
    threshold: Any,
    *,
    default_threshold: float,
    limits: Limits,
    box_text: str,
    tokenize: Callable[[str], list[int]],
) -> tuple[Prompt, ...]:
    """The prompts of ``Segmenter.segment``, which says what each argument may be.

    Raises:
        SpecError: neither text nor boxes, a value of another kind, or lists that do not fit together.
    """
    texts = _texts(text)
    nested, given = _boxes(boxes)
    if not texts and not any(map(len, given)):
        raise refused("nothing to look for", "Give text, boxes or both.")
    count = len(texts) or (len(given) if nested else 1)
    if nested and len(given) != count:
        raise refused(f"{len(given)} lists of boxes for {count} texts", "Give a list for each, or one for all.")
    own_labels = read_labels(labels, [len(item) for item in given], nested, each="boxes")
    thresholds = _thresholds(threshold, default_threshold, count)
    prompts = []
    for index in range(count):
        at = index if nested else 0
        if not texts and not len(given[at]):
            raise refused(f"prompt {index + 1} of {count} has neither text nor boxes")
        if len(given[at]) > limits.boxes:
            raise refused(f"{len(given[at])} boxes in one prompt, the model takes at most {limits.boxes}")
        words = texts[index] if texts else box_text
        ids = tokenize(words) if isinstance(words, str) else _checked_ids(words, limits)
        name = "boxes" if not texts else words if isinstance(words, str) else f"ids {ids}"
        prompts.append(Prompt(name=name, ids=ids, boxes=given[at], labels=own_labels[at], threshold=thresholds[index]))
    return tuple(prompts)


def boxes_to_fractions(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, 4) of (x0, y0, x1, y1) in pixels → (N, 4) float32 of (cx, cy, w, h) as fractions of the picture.

    A box may reach over the picture's edge, as upstream takes it, by as much as the picture is large.

    Raises:
        SpecError: a box outside the picture, or that reaches further.
    """
    scale = np.array([width, height, width, height], dtype=np.float64)
    for box in boxes:
        check_box(box, height, width)
    low, high = boxes[:, :2], boxes[:, 2:]
    fractions = (np.concatenate([(low + high) / 2, high - low], axis=1) / scale).astype(np.float32)
    if (fractions[:, 2:] <= 0).any():
        raise refused(f"a box is too thin for float32: {boxes.tolist()}")
    return fractions


def check_box(box: np.ndarray, height: int, width: int) -> None:
    """Refuse x0, y0, x1, y1 in pixels of a box outside the picture, or that reaches further over its edge than it is large.

    Raises:
        SpecError: naming it.
    """
    corners = box.reshape(2, 2) / (width, height)
    if (corners[1] <= 0).any() or (corners[0] >= 1).any():
        raise refused(f"the box {box.tolist()} lies outside the picture, which is {width} x {height} pixels")
    if (corners < -1).any() or (corners > 2).any():
        fact = f"the box {box.tolist()} reaches further over the edge than the picture is large, {width} x {height} pixels"
        raise refused(fact, "Give boxes in pixels of this picture.")


def boxes_to_pixels(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, 4) of (cx, cy, w, h) as fractions → (N, 4) of (x0, y0, x1, y1) in pixels."""
    centre, half = boxes[:, :2], boxes[:, 2:] * np.float32(0.5)
    scale = np.array([width, height, width, height], dtype=np.float32)
    return np.concatenate([centre - half, centre + half], axis=1) * scale


def whole_number(value: Any, name: str, least: int = 1) -> int:
    """``value`` as an int.

    Raises:
        SpecError: it is no whole number of at least ``least``.
    """
    number = _index(value)
    if number is None or number < least:
        raise refused(f"{name} is a whole number from {least}, got {short(value)}")
    return number


def _texts(text: Any) -> list[str | list[int]]:
    if text is None:
        return []
    if isinstance(text, str):
        return [_encodable(text)]
    items = items_of(text, "text is words or token ids, or a list of either")
    if not items:
        raise refused("the list of texts is empty", "Give at least one, or None with boxes.")
    if all(_index(item) is not None for item in items):
        return [[operator.index(item) for item in items]]  # one prompt in token ids
    texts: list[str | list[int]] = []
    for item in items:
        if isinstance(item, str):
            texts.append(_encodable(item))
            continue
        ids = [_index(value) for value in items_of(item, "each text is words or a list of token ids")]
        if None in ids:
            raise refused(f"token ids are whole numbers, got {short(item)}")
        texts.append([value for value in ids if value is not None])
    return texts


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused(f"the text {text!r} holds half of a surrogate pair, which is no character") from None
    return text


def _checked_ids(ids: list[int], limits: Limits) -> list[int]:
    if not 0 < len(ids) <= limits.context_length or not all(0 <= value < limits.vocab_size for value in ids):
        raise refused(f"expected 1 to {limits.context_length} token ids below {limits.vocab_size}, got {short(ids)}")
    return ids


def _boxes(boxes: Any) -> tuple[bool, list[np.ndarray]]:
    """Whether there is a list of boxes for each prompt, and the lists, (N, 4) each; a single one is for all."""
    if boxes is None:
        return False, [np.zeros((0, 4))]
    items = items_of(boxes, "boxes are a list of boxes, or a list of them for each prompt")
    if not items:
        return False, [np.zeros((0, 4))]
    arrays = [_numbers(item) for item in items]
    flat = [array.ndim == 1 and len(array) > 0 for array in arrays]
    if all(flat):
        return False, [_checked_boxes(arrays, boxes)]
    if any(flat):
        raise refused(
            f"some of the boxes stand in a list of their own and some do not: {short(boxes)}",
            "Give one list of boxes for all prompts, or a list for each.",
        )
    return True, [_checked_boxes(list(array), boxes) for array in arrays]


def _numbers(item: Any) -> np.ndarray:
    """A box or a list of boxes as an array, (4) or (N, 4) if all is well."""
    try:
        array = np.asarray(item)
        if array.dtype.kind not in "iuf" and array.size:
            raise TypeError
    except Exception:  # lists of different lengths, a tensor elsewhere, another library's own refusal
        array = np.zeros(())
    if array.ndim not in (1, 2):
        raise refused(
            f"a box is four numbers x0, y0, x1, y1 in pixels, got {short(item)}",
            "One box is given as [[x0, y0, x1, y1]].",
        )
    return array


def _checked_boxes(boxes: list[np.ndarray], given: Any) -> np.ndarray:
    for box in boxes:
        if box.shape != (4,):
            raise refused(f"a box is four numbers x0, y0, x1, y1 in pixels, got {short(given)}")
        with np.errstate(over="ignore"):  # of a longer float
            box = box.astype(np.float64)
        if not np.isfinite(box).all() or (box[2:] <= box[:2]).any():
            raise refused(f"a box is x0, y0, x1, y1 in pixels with x0 < x1 and y0 < y1, got {box.tolist()}")
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def read_labels(labels: Any, counts: Sequence[int], nested: bool, *, each: str) -> list[np.ndarray]:
    """Read 1 or 0 for everything given, int64 (N,) for each list; without labels all are 1.

    Args:
        counts: how many things each list holds. nested: whether labels are a list of lists. each: those things, in the plural.

    Raises:
        SpecError: there are more or fewer, or one is neither True nor False, 1 nor 0.
    """
    if labels is None:
        return [np.ones(count, dtype=np.int64) for count in counts]
    rule = f"labels are True or False, 1 or 0, for each of the {each}, listed as the {each} are"
    given = items_of(labels, rule)
    lists = [items_of(item, f"{rule}, a list for each list") for item in given] if nested else [given]
    if len(lists) != len(counts):
        raise refused(f"{len(lists)} lists of labels for {len(counts)} lists of {each}", "Give a list for each.")
    found = []
    for own, count in zip(lists, counts, strict=True):
        if len(own) != count:
            raise refused(f"{len(own)} labels for {count} {each}", "Give one for each.")
        found.append(np.array([label_of(value) for value in own], dtype=np.int64))
    return found


def truth(value: Any, name: str) -> bool:
    """``value``, True or False, of Python, numpy or torch, or 1 or 0.

    Raises:
        SpecError: it is neither.
    """
    number = _truth(value)
    if number is None:
        raise refused(f"{name} is True or False, got {short(value)}")
    return bool(number)


def label_of(value: Any) -> int:
    """1 for what is wanted, 0 for what is not.

    Raises:
        SpecError: ``value`` is neither, as a truth value or a number.
    """
    number = _truth(value)
    if number is None:
        raise refused(f"a label is True for what is wanted and False for what is not, got {short(value)}")
    return number


def _truth(value: Any) -> int | None:
    """1 or 0 of a truth value or a number; None of anything else."""
    try:
        scalar = _scalar(value)
    except Exception:  # a tensor that has no value here
        return None
    number = int(scalar) if isinstance(scalar, bool) else _index(scalar)
    return number if number in (0, 1) else None


def _thresholds(threshold: Any, default: float, count: int) -> list[float]:
    if threshold is None:
        return [default] * count
    if isinstance(threshold, Iterable) and not isinstance(threshold, str) and getattr(threshold, "ndim", 1) != 0:
        given = [fraction(value, "a threshold") for value in items_of(threshold, "a threshold is a number, or a list of them")]
        if len(given) != count:
            raise refused(f"{len(given)} thresholds for {count} prompts", "Give one for each, or one for all.")
        return given
    return [fraction(threshold, "a threshold")] * count


def fraction(value: Any, name: str, most: float = 1) -> float:
    """``value`` as a float.

    Raises:
        SpecError: it is no number from 0 to ``most``.
    """
    try:
        scalar = _scalar(value)
        number = math.nan if isinstance(scalar, (str, bytes, bytearray, bool, np.ndarray)) else float(scalar)
    except Exception:  # no number, or one that is too large
        number = math.nan
    if not 0 <= number <= most:
        raise refused(f"{name} is a number from 0{f' to {most}' if most < math.inf else ''}, got {short(value)}")
    return number


def items_of(value: Any, rule: str) -> list[Any]:
    """What stands in a list, tuple, array or other iterable that has an order."""
    try:
        if isinstance(value, (str, bytes, bytearray, Mapping, Set)):
            raise TypeError
        return list(value.tolist() if hasattr(value, "tolist") else value)
    except Exception:  # no iterable, a tensor that has no values here
        raise refused(f"{rule}, got {short(value)}") from None


def _index(value: Any) -> int | None:
    """A whole number of Python, numpy or torch as an int; None of anything else, truth values included."""
    try:
        value = _scalar(value)
        return None if isinstance(value, bool) else operator.index(value)
    except Exception:  # a tensor that has no value here
        return None


def _scalar(value: Any) -> Any:
    """A scalar of numpy or torch as one of Python; anything else as it is."""
    return value.item() if hasattr(value, "item") and not getattr(value, "ndim", -1) else value


def short(value: Any) -> str:
    """``value`` in at most 80 characters."""
    words = " ".join(repr(value).split())
    return words if len(words) <= 80 else f"{words[:77]}..."


def refused(fact: str, remedy: str = "") -> SpecError:
    """The error of a prompt."""
    return SpecError(fact, remedy=remedy, step=Step.RUN)
