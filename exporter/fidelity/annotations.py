"""A file of annotations as COCO has them, read and checked before anything is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Discriminator, Field, FiniteFloat, Tag, ValidationError

from sam3x.errors import SpecError, Step
from sam3x.fidelity.score import tools

Id = Annotated[int | str, Field(union_mode="left_to_right")]
"""1, 1.0 and "1" are the same."""

_REMEDY = "Give a JSON file of annotations as COCO has them."


class RunLengths(BaseModel):
    """A mask, column by column: lengths of runs, the first of zeros, or pycocotools' compressed string of them."""

    size: tuple[int, int]
    counts: list[Annotated[int, Field(ge=0)]] | str


Polygons = list[Annotated[list[FiniteFloat], Field(min_length=6)]]
Mask = Annotated[
    Annotated[RunLengths, Tag("runs")] | Annotated[Polygons, Tag("polygons")],
    Discriminator(lambda given: "runs" if isinstance(given, (dict, RunLengths)) else "polygons"),
]


class Picture(BaseModel):
    """A picture; ``width`` and ``height`` in pixels are those of the file where they are left out."""

    id: Id
    file_name: str = Field(min_length=1)
    width: int | None = Field(default=None, ge=1)
    height: int | None = Field(default=None, ge=1)


class Category(BaseModel):
    """A kind of object: the ``category_id`` of annotations and its name."""

    id: Id
    name: str = Field(pattern=r"[^\s_]")

    @property
    def phrase(self) -> str:
        """The name as it is asked: underscores are spaces."""
        return " ".join(self.name.replace("_", " ").split())


class Annotation(BaseModel):
    """An object; ``bbox`` is x, y, width, height in pixels. Polygons are x, y, x, y, …"""

    image_id: Id
    category_id: Id
    segmentation: Mask | None = None
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat] | None = None
    iscrowd: bool | None = False


class Annotations(BaseModel):
    """The document. Whatever else it holds is ignored."""

    images: list[Picture]
    annotations: list[Annotation]
    categories: list[Category]


def read_annotations(path: Path) -> Annotations:
    """The document in ``path``.

    Raises:
        SpecError: it cannot be read, lacks what is needed, or contradicts itself.
    """
    try:
        document = Annotations.model_validate_json(path.read_text(encoding="utf-8-sig"))
    except ValidationError as error:
        raise _refused(path, _first(error)) from None
    except (OSError, ValueError) as error:  # UnicodeDecodeError is one
        raise _refused(path, getattr(error, "strerror", None) or str(error)) from error
    for name, items in (("images", document.images), ("categories", document.categories)):
        twice = [str(key) for key, count in Counter(item.id for item in items).items() if count > 1]
        if twice:
            raise _refused(path, f"{name} has the id {twice[0]} more than once")
    known = {item.id for item in document.categories}
    for index, item in enumerate(document.annotations):
        if item.category_id not in known:
            raise _refused(path, f"annotations.{index} is of category {item.category_id}, which categories has not")
        if not item.segmentation and item.bbox is None:
            raise _refused(path, f"annotations.{index} has neither segmentation nor bbox")
    return document


def masks_of(path: Path, items: Iterable[Annotation], height: int, width: int) -> list[dict[str, Any]]:
    """pycocotools' compressed RLE of every item's segmentation, in a picture of ``height`` by ``width``.

    Raises:
        SpecError: a mask that is not of that size, or a polygon that reaches further out than the picture is large.
        TargetUnavailableError: pycocotools is missing.
    """
    return [_mask(path, item, height, width) for item in items]


def _mask(path: Path, item: Annotation, height: int, width: int) -> dict[str, Any]:
    made, given = tools(), item.segmentation
    subject = f"a mask of picture {item.image_id}, category {item.category_id},"
    assert given
    if isinstance(given, RunLengths):
        mask = {"size": [height, width], "counts": given.counts}
        if isinstance(given.counts, list):
            mask = made.frPyObjects(mask, height, width)
        if given.size != (height, width) or not _fills(mask, height, width):
            raise _refused(path, f"{subject} is not of {width} × {height} pixels")
        return dict(mask)
    for polygon in given:
        points = np.array(polygon[: len(polygon) // 2 * 2]).reshape(-1, 2)
        # pycocotools counts the pixels of every edge in 32 bits
        if len(polygon) % 2 or (points < (-width, -height)).any() or (points > (2 * width, 2 * height)).any():
            raise _refused(path, f"{subject} has a polygon that is none of points in {width} × {height} pixels")
    return dict(made.merge(made.frPyObjects(given, height, width)))


def _fills(mask: dict[str, Any], height: int, width: int) -> bool:
    """Whether the runs are of all pixels and no more, without which pycocotools never ends."""

    def fits(rows: int, columns: int) -> bool:
        try:
            tools().decode({**mask, "size": [rows, columns]})
        except ValueError:
            return False
        return True

    return fits(height, width) and not fits(1, height * width - 1)


def _first(error: ValidationError) -> str:
    """The first breach, and where."""
    item = error.errors()[0]
    where = ".".join(str(part) for part in item["loc"] if isinstance(part, int) or part in _WORDS)
    return f"{where}: {item['msg']}" if where else item["msg"]


_WORDS = {name for model in (Annotations, Picture, Category, Annotation, RunLengths) for name in model.model_fields}


def _refused(path: Path, fact: str) -> SpecError:
    return SpecError(f"{path} cannot be read as COCO annotations ({fact})", remedy=_REMEDY, step=Step.RUN)
