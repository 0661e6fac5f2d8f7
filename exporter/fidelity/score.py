"""Answers against annotations: COCO's average precision by pycocotools, mask IoU of hits, false alarms."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sam3x.errors import Step, TargetUnavailableError

HIT = 0.5
"""Mask IoU from which an answer is one to an annotated object: COCO's lowest."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answers:
    """What was found of one prompt in one picture.

    Attributes:
        scores: (N,) 0 to 1. boxes: (N, 4) x0, y0, x1, y1 in pixels. masks: pycocotools' compressed RLE of each.
    """

    scores: np.ndarray
    boxes: np.ndarray
    masks: Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """One prompt of one picture and what is right: ``boxes`` (K, 4) in pixels, ``masks`` RLE of each; ``crowd`` (K,) bool.

    ``masks`` is None where boxes alone are annotated, then of all that is asked.
    """

    picture: int
    phrase: str
    size: tuple[int, int]
    boxes: np.ndarray
    masks: Sequence[dict[str, Any]] | None
    crowd: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The figures of one contender.

    Attributes:
        box_ap50, mask_ap50: COCO's AP at IoU 0.5, the mean over phrases, of all answers. None: nothing is annotated.
        mask_iou: mean over the hits, which are answers above the threshold whose mask overlaps an annotated one by half.
            Where boxes alone are annotated hits are of boxes, and ``mask_iou`` and ``mask_ap50`` are None.
        recall: share of the annotated objects that were hit. precision: share of the answers above the threshold that are hits;
            what lies on a crowd counts neither way. false_alarms: share of the prompts for nothing with an answer.
        pictures, prompts, objects: how many; crowds, which need not be found, are no objects.
    """

    box_ap50: float | None
    mask_ap50: float | None
    mask_iou: float | None
    recall: float | None
    precision: float | None
    false_alarms: float | None
    pictures: int
    prompts: int
    objects: int


def encode(masks: np.ndarray) -> list[dict[str, Any]]:
    """(N, height, width) bool → compressed RLE of each.

    Raises:
        TargetUnavailableError: pycocotools is missing.
    """
    made = tools()
    return made.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))) if len(masks) else []


def box_ious(first: np.ndarray, second: np.ndarray, crowd: bool = False) -> np.ndarray:
    """(N, 4) and (K, 4) corners in pixels → (N, K) IoU; ``crowd``: the share of the first that lies in the second."""
    if not len(first) or not len(second):
        return np.zeros((len(first), len(second)))
    given = (np.array([_xywh(box) for box in boxes]) for boxes in (first, second))
    return np.asarray(tools().iou(*given, [crowd] * len(second)))


def mask_ious(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], crowd: bool = False) -> np.ndarray:
    """(N, K) IoU of masks as RLE; ``crowd``: the share of the first that lies in the second."""
    if not first or not second:
        return np.zeros((len(first), len(second)))
    return np.asarray(tools().iou(list(first), list(second), [crowd] * len(second)))


def score(asked: Sequence[Asked], answers: Sequence[Answers], threshold: float) -> Figures:
    """The figures of ``answers``, one for each of ``asked``.

    Args:
        threshold: of hits and false alarms. AP takes all answers, so give those of low scores too.

    Raises:
        TargetUnavailableError: pycocotools is missing.
    """
    names = sorted({item.phrase for item in asked})
    truth, found, shapes = _documents(asked, answers, {name: index + 1 for index, name in enumerate(names)})
    of_masks = all(item.masks is not None for item in asked)
    overlaps: list[float] = []
    nothing = alarmed = wanted = answered = 0
    for item, given in zip(asked, answers, strict=True):
        kept = np.flatnonzero(given.scores > threshold)
        answered += len(kept)
        if not len(item.boxes):
            nothing += 1
            alarmed += bool(len(kept))
            continue
        own = np.flatnonzero(~item.crowd)
        shared = _shared(given, kept, item, own)
        hits = pairs(shared)
        overlaps += [float(shared[pair]) for pair in hits]
        wanted += len(own)
        others = np.delete(kept, [row for row, _ in hits])
        on_crowds = _shared(given, others, item, np.flatnonzero(item.crowd), crowd=True)
        answered -= int((on_crowds >= HIT).any(axis=1).sum())
    return Figures(
        box_ap50=_ap50(truth, found, shapes, names, "bbox") if wanted else None,
        mask_ap50=_ap50(truth, found, shapes, names, "segm") if wanted and of_masks else None,
        mask_iou=float(np.mean(overlaps)) if overlaps and of_masks else None,
        recall=len(overlaps) / wanted if wanted else None,
        precision=len(overlaps) / answered if answered else None,
        false_alarms=alarmed / nothing if nothing else None,
        pictures=len({item.picture for item in asked}),
        prompts=len(asked),
        objects=wanted,
    )


def _shared(given: Answers, rows: np.ndarray, item: Asked, columns: np.ndarray, crowd: bool = False) -> np.ndarray:
    """Overlaps of some answers with some of what is annotated: of masks where there are any, else of boxes."""
    if item.masks is None:
        return box_ious(given.boxes[rows], item.boxes[columns], crowd)
    return mask_ious([given.masks[row] for row in rows], [item.masks[column] for column in columns], crowd)


def pairs(overlaps: np.ndarray) -> list[tuple[int, int]]:
    """Rows and columns of (N, K) overlaps that are one: the largest overlap first, down to ``HIT``."""
    left, chosen = np.array(overlaps, dtype=float), []
    while left.size and left.max() >= HIT:
        row, column = (int(index) for index in np.unravel_index(left.argmax(), left.shape))
        chosen.append((row, column))
        left[row], left[:, column] = -1, -1
    return chosen


def _documents(
    asked: Sequence[Asked], answers: Sequence[Answers], number: dict[str, int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[int, tuple[int, int]]]:
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    shapes: dict[int, tuple[int, int]] = {}
    for item, given in zip(asked, answers, strict=True):
        shapes[item.picture] = item.size
        common = {"image_id": item.picture, "category_id": number[item.phrase]}
        for row, (box, crowd) in enumerate(zip(item.boxes, item.crowd, strict=True)):
            own: dict[str, Any] = {"area": float(np.prod(_xywh(box)[2:]))}
            if item.masks is not None:
                own = {"area": float(tools().area(item.masks[row])), "segmentation": item.masks[row]}
            truth.append({**common, **own, "bbox": _xywh(box), "iscrowd": int(crowd)})
        for box, mask, value in zip(given.boxes, given.masks, given.scores, strict=True):
            found.append({**common, "bbox": _xywh(box), "segmentation": mask, "score": float(value)})
    for index, annotation in enumerate(truth):
        annotation["id"] = index + 1
    return truth, found, shapes


def _xywh(box: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = (float(value) for value in box)
    return [x0, y0, x1 - x0, y1 - y0]


def _ap50(
    truth: list[dict[str, Any]],
    found: list[dict[str, Any]],
    shapes: dict[int, tuple[int, int]],
    names: list[str],
    kind: str,
) -> float:
    """COCO's AP at IoU 0.5, all areas, at most 100 answers a phrase of a picture."""
    if not found:
        return 0.0
    tools()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": index, "height": size[0], "width": size[1]} for index, size in shapes.items()],
            "categories": [{"id": index + 1, "name": name} for index, name in enumerate(names)],
            "annotations": truth,
        }
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes([dict(item) for item in found]), kind)
        run.params.iouThrs = np.array([HIT])
        run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][0, :, :, 0, -1]  # recalls, phrases
    known = precision[:, (precision > -1).all(axis=0)]
    return float(known.mean())


def tools() -> Any:
    """``pycocotools.mask``.

    Raises:
        TargetUnavailableError: it is missing.
    """
    try:
        from pycocotools import mask
    except ImportError:
        raise TargetUnavailableError(
            "COCO's evaluation needs pycocotools", remedy='Install it: pip install "sam3x[runtime]"', step=Step.RUN
        ) from None
    return mask
