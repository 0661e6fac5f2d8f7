"""A file of annotations as COCO has them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

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
        self._images, self._annotations = _Spool(), _Spool()
        self._categories: dict[str, int] = {}

    def add(self, name: str, result: Masks) -> None:
        """The detections of a picture; ``name`` becomes its ``file_name``."""
        self.add_dict(name, result.to_dict())

    def add_dict(self, name: str, found: Mapping[str, Any]) -> None:
        """The same of what ``Masks.to_dict`` gave, as a line of ``sam3x run --json`` has it."""
        width, height = found["width"], found["height"]
        image = len(self._images) + 1
        self._images.add({"id": image, "file_name": name, "width": width, "height": height})
        for prompt in found["prompts"]:
            self._categories.setdefault(prompt, len(self._categories) + 1)
        for item in found["detections"]:
            counts = item["mask"]["counts"]
            encoded = self._compressed({"size": [height, width], "counts": counts}, height, width)
            x0, y0, x1, y1 = item["box"]
            self._annotations.add(
                {
                    "id": len(self._annotations) + 1,
                    "image_id": image,
                    "category_id": self._categories[item["label"]],
                    "bbox": [x0, y0, round(x1 - x0, 3), round(y1 - y0, 3)],
                    "area": sum(counts[1::2]),
                    "iscrowd": 0,
                    "score": item["score"],
                    "segmentation": {"size": [height, width], "counts": encoded["counts"].decode("ascii")},
                }
            )

    def write(self, path: str | Path) -> None:
        """The file, which ``pycocotools.coco.COCO`` reads.

        Raises:
            ArtifactError: it cannot be written.
        """
        written(path, self._write)

    def _write(self, path: Path) -> None:
        categories = [{"id": number, "name": name} for name, number in self._categories.items()]
        with path.open("w", encoding="utf-8") as file:
            file.write('{"images": [')
            self._images.copy(file)
            file.write('], "annotations": [')
            self._annotations.copy(file)
            file.write(f'], "categories": {json.dumps(categories)}}}\n')


class _Spool:
    """Records on disk until the document is written: a folder of pictures has more than memory should hold."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - lives as long as this
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, record: Mapping[str, Any]) -> None:
        self._file.write(f"{', ' if self._count else ''}{json.dumps(record)}")
        self._count += 1

    def copy(self, file: TextIO) -> None:
        """Everything so far, commas between; more may be added after it."""
        self._file.seek(0)
        shutil.copyfileobj(self._file, file)
        self._file.seek(0, 2)
