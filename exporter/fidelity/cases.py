"""Pictures with annotations: what is asked of each, and what is right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sam3x.errors import SpecError, Step
from sam3x.fidelity.annotations import Annotation, Annotations, Picture, masks_of, read_annotations
from sam3x.fidelity.score import Asked, tools
from sam3x.runtime.pictures import open_picture, stored_picture


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """A picture and what is asked of it.

    Attributes:
        picture: anything that ``Segmenter.encode`` takes. asked: in order.
        stored: the annotations are of the pixels in the file, not as its EXIF orientation turns them.
    """

    picture: Any
    asked: tuple[Asked, ...]
    stored: bool = False

    def opened(self) -> Any:
        """Return the picture for ``Segmenter.encode``, not turned by EXIF where the annotations are of it as stored."""
        return stored_picture(self.picture) if self.stored else self.picture


def coco_cases(
    annotations: Path,
    pictures: Path,
    *,
    limit: int | None = None,
    absent: int = 3,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Case]:
    """Cases of a COCO file: a picture is asked the names of its categories, and some that are not in it.

    Every picture is decoded once, so that a damaged one is told before anything is measured. Where no annotation has a
    segmentation, boxes alone are right or wrong.

    Args:
        annotations: a JSON file as COCO has them. pictures: the folder of its ``file_name``.
        limit: only as many pictures, drawn by ``seed``. absent: categories a picture that are not in it, drawn by ``seed``.
        tell: is given what is left out.

    Raises:
        SpecError: a file cannot be read, is of another size than its annotations, or there is no picture with categories.
        TargetUnavailableError: pycocotools or Pillow is missing.
    """
    tools()
    document = read_annotations(annotations)
    rng = np.random.default_rng(seed)
    chosen = sorted(document.images, key=lambda item: (isinstance(item.id, str), item.id))
    if limit is not None and limit < len(chosen):
        chosen = [chosen[index] for index in sorted(rng.permutation(len(chosen))[:limit])]
    missing = [path for path in (pictures / item.file_name for item in chosen) if not path.is_file()]
    if missing:
        fact = f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else "")
        raise SpecError(fact, remedy="Give the folder of the pictures with --pictures.", step=Step.RUN)
    questions = _Questions(annotations, document, absent, rng)
    cases = [questions.of(number, item, pictures / item.file_name) for number, item in enumerate(chosen)]
    if questions.left_out:
        tell(f"{questions.left_out} prompts are left out: of their objects some have no segmentation, only a box")
    if not any(case.asked for case in cases):
        raise SpecError(f"{annotations} holds no picture with categories", step=Step.RUN)
    return [case for case in cases if case.asked]


class _Questions:
    def __init__(self, path: Path, document: Annotations, absent: int, rng: np.random.Generator) -> None:
        self._path, self._absent, self._rng = path, absent, rng
        self._with_masks = any(item.segmentation for item in document.annotations)
        phrases = {item.id: item.phrase for item in document.categories}
        self._phrases = list(dict.fromkeys(phrases.values()))  # two categories of one name are one
        self._annotated: dict[Any, dict[str, list[Annotation]]] = defaultdict(lambda: defaultdict(list))
        for item in document.annotations:
            self._annotated[item.image_id][phrases[item.category_id]].append(item)
        self.left_out = 0

    def of(self, number: int, picture: Picture, path: Path) -> Case:
        size, stored = self._size(picture, path)
        present = self._annotated[picture.id]
        others = [name for name in self._phrases if name not in present]
        absent = sorted(self._rng.permutation(len(others))[: self._absent])
        asked = []
        for name in [*(name for name in self._phrases if name in present), *(others[index] for index in absent)]:
            items = present.get(name, [])
            if self._with_masks and not all(item.segmentation for item in items):
                self.left_out += 1
                continue
            masks = masks_of(self._path, items, *size) if self._with_masks else None
            boxes = [item.bbox for item in items] if masks is None else [tools().toBbox(item) for item in masks]
            corners = np.array(boxes, dtype=np.float32).reshape(-1, 4)
            corners[:, 2:] += corners[:, :2]
            crowd = np.array([bool(item.iscrowd) for item in items], dtype=bool)
            asked.append(Asked(picture=number, phrase=name, size=size, boxes=corners, masks=masks, crowd=crowd))
        return Case(picture=path, asked=tuple(asked), stored=stored)

    def _size(self, picture: Picture, path: Path) -> tuple[tuple[int, int], bool]:
        """Height and width of what was annotated, and whether that is the file as it is stored."""
        width, height = shown = open_picture(path).size
        told = (picture.width or width, picture.height or height)
        if told != shown and told != stored_picture(path).size:
            fact = f"{path} has {width} × {height} pixels, and its annotations are of {told[0]} × {told[1]}"
            raise SpecError(fact, remedy="Give the pictures that were annotated.", step=Step.RUN)
        return (told[1], told[0]), told != shown
