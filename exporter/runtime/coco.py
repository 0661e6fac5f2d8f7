"""A file of annotations as COCO has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3x.errors import Step, TargetUnavailableError
from sam3x.runtime.output import written
from sam3x.runtime.pictures import INSTALL

if TYPE_CHECKING:
    from sam3x.runtime.result import Masks


class CocoFile:
    """Annotations in COCO's format, of one picture after another.

    ``segmentation`` is compressed RLE, by pycocotools itself; ``bbox`` is x, y, width, height in pixels; ``score`` is added, as
    in COCO's files of results. A category is a prompt.

    Raises:
        TargetUnavailableError: pycocotools is not installed.
    """

    def __init__(self) -> None:
        try:
            from pycocotools.mask import frPyObjects
        except ImportError:
            raise TargetUnavailableError("writing COCO annotations needs pycocotools", remedy=INSTALL, step=Step.RUN) from None
        self._compressed = frPyObjects
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._categories: dict[str, int] = {}

    def add(self, name: str, result: Masks) -> None:
        """The detections of a picture; ``name`` becomes its ``file_name``."""
        width, height = result.picture.size
        image = len(self._images) + 1
        self._images.append({"id": image, "file_name": name, "width": width, "height": height})
        for prompt in result.prompts:
            self._categories.setdefault(prompt, len(self._categories) + 1)
        for index, (box, score, label) in enumerate(zip(result.boxes, result.scores, result.labels, strict=True)):
            runs = result.run_lengths(index)
            encoded = self._compressed({"size": [height, width], "counts": runs.tolist()}, height, width)
            x0, y0, x1, y1 = (round(float(value), 3) for value in box)
            self._annotations.append(
                {
                    "id": len(self._annotations) + 1,
                    "image_id": image,
                    "category_id": self._categories[label],
                    "bbox": [x0, y0, round(x1 - x0, 3), round(y1 - y0, 3)],
                    "area": int(runs[1::2].sum()),
                    "iscrowd": 0,
                    "score": round(float(score), 6),
                    "segmentation": {"size": [height, width], "counts": encoded["counts"].decode("ascii")},
                }
            )

    def write(self, path: str | Path) -> None:
        """The file, which ``pycocotools.coco.COCO`` reads.

        Raises:
            ArtifactError: it cannot be written.
        """
        document = {
            "images": self._images,
            "annotations": self._annotations,
            "categories": [{"id": number, "name": name} for name, number in self._categories.items()],
        }
        written(path, lambda file: file.write_text(json.dumps(document) + "\n", encoding="utf-8"))
