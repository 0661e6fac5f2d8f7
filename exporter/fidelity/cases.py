"""Pictures with annotations: what is asked of each, and what is right."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sam3x.errors import SpecError, Step
from sam3x.fidelity.score import Asked, tools


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """A picture (anything that ``Segmenter.encode`` takes) and what is asked of it."""

    picture: Any
    asked: tuple[Asked, ...]


def coco_cases(annotations: Path, pictures: Path, *, limit: int | None = None, absent: int = 3, seed: int = 0) -> list[Case]:
    """Cases of a COCO file: a picture is asked the names of its categories, and some that are not in it.

    Args:
        annotations: a JSON file as COCO has them, with segmentations. pictures: the folder of its ``file_name``.
        limit: only as many pictures, drawn by ``seed``. absent: categories a picture that are not in it, drawn by ``seed``.

    Raises:
        SpecError: a file cannot be read, or holds no picture with annotations.
        TargetUnavailableError: pycocotools is missing.
    """
    mask_tools = tools()
    coco = _opened(annotations)
    names = {int(item["id"]): str(item["name"]).replace("_", " ") for item in coco.dataset["categories"]}
    rng = np.random.default_rng(seed)
    images = sorted(coco.getImgIds())
    if limit is not None and limit < len(images):
        images = sorted(images[index] for index in rng.permutation(len(images))[:limit])
    cases = []
    for image in images:
        entry = coco.loadImgs(image)[0]
        path = pictures / str(entry["file_name"])
        if not path.is_file():
            raise SpecError(f"{path} is missing", remedy="Give the folder of the pictures with --pictures.", step=Step.RUN)
        size = (int(entry["height"]), int(entry["width"]))
        own = [item for item in coco.loadAnns(coco.getAnnIds(imgIds=image)) if item.get("segmentation")]
        present = {int(item["category_id"]) for item in own}
        others = [index for index in sorted(names) if index not in present]
        wanted = [*sorted(present), *(others[index] for index in sorted(rng.permutation(len(others))[:absent]))]
        asked = []
        for category in wanted:
            of = [item for item in own if item["category_id"] == category]
            runs = [coco.annToRLE(item) for item in of]
            boxes = np.array([mask_tools.toBbox(item) for item in runs], dtype=np.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            crowd = np.array([bool(item.get("iscrowd")) for item in of], dtype=bool)
            asked.append(Asked(picture=int(image), phrase=names[category], size=size, boxes=boxes, masks=runs, crowd=crowd))
        if asked:
            cases.append(Case(picture=path, asked=tuple(asked)))
    if not cases:
        raise SpecError(f"{annotations} holds no picture with categories", step=Step.RUN)
    return cases


def _opened(path: Path) -> Any:
    from pycocotools.coco import COCO

    with _told(path), contextlib.redirect_stdout(io.StringIO()):
        with path.open(encoding="utf-8") as file:
            document = json.load(file)
        if not isinstance(document, dict) or not all(isinstance(document.get(key), list) for key in _PARTS):
            raise ValueError(f"it has not the lists {', '.join(_PARTS)}")
        coco = COCO()
        coco.dataset = document
        coco.createIndex()
    return coco


_PARTS = ("images", "annotations", "categories")


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = "Give a JSON file of annotations as COCO has them."
        raise SpecError(f"{path} cannot be read as COCO annotations ({error})", remedy=remedy, step=Step.RUN) from error
