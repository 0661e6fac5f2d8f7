"""Results of a segmentation and of clicks: masks, boxes and scores, drawn and written."""

from __future__ import annotations

import colorsys
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3x.errors import SpecError, Step
from sam3x.runtime.output import made_folder, run_lengths, written
from sam3x.runtime.prompts import whole_number
from sam3x.runtime.resize import resize_bilinear

if TYPE_CHECKING:
    from PIL import Image

_BAND = 1 << 20  # pixels that are stretched at a time
_OF_EACH = ("scores", "prompt", "small_masks", "logits")  # fields of ``Clicked`` with a row a mask


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Masks:
    """Masks of a picture, those of one prompt together.

    They are kept as the model gives them, 288 by 288 in SAM3, and stretched to the picture when they are asked for: ``masks``
    is all of them, a byte a pixel each; ``mask(index)`` is one.

    Attributes:
        scores: (N,) float32, 0 to 1.
        prompt: (N,) int64, which prompt each mask answers. prompts: the prompts in words.
        picture: the picture they were found in, RGB, turned as its EXIF orientation said.
        small_masks: (N, h, w) float32, what is stretched. border: a stretched value above it is part of the mask.
    """

    scores: np.ndarray
    prompt: np.ndarray
    prompts: tuple[str, ...]
    picture: Image.Image
    small_masks: np.ndarray
    border: float
    _runs: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        width, height = self.picture.size
        found = [f"{label} {score:.3f}" for label, score in zip(self.labels[:4], self.scores[:4], strict=True)]
        listed = ", ".join([*found, *(["…"] if len(self) > 4 else [])]) or "none"
        return f"<{type(self).__name__}: {len(self)} masks in {width} x {height} pixels: {listed}>"

    if TYPE_CHECKING:  # else a field of that name in a subclass would take it as its default

        @property
        def boxes(self) -> np.ndarray:
            """(N, 4) float32, x0, y0, x1, y1 in pixels."""

    @property
    def labels(self) -> list[str]:
        """The prompt of each mask."""
        return [self.prompts[index] for index in self.prompt]

    @functools.cached_property
    def masks(self) -> np.ndarray:
        """(N, height, width) bool, made at the first use and kept.

        Raises:
            SpecError: there is no memory for all of them.
        """
        width, height = self.picture.size
        try:
            masks = np.empty((len(self), height, width), dtype=bool)
        except MemoryError:
            size = len(self) * height * width / 1e9
            raise SpecError(
                f"{len(self)} masks in {width} x {height} pixels take {size:.1f} GB, more than there is",
                remedy="Take one at a time with mask(index), or find fewer: threshold, max_detections.",
                step=Step.RUN,
            ) from None
        for index in range(len(self)):
            self._fill(index, masks[index])
        return masks

    def mask(self, index: int) -> np.ndarray:
        """(height, width) bool, of one of them."""
        width, height = self.picture.size
        mask = np.empty((height, width), dtype=bool)
        self._fill(range(len(self))[index], mask)
        return mask

    def run_lengths(self, index: int) -> np.ndarray:
        """A mask as COCO's uncompressed RLE: (runs,) uint32, column by column, the first of zeros. Made once and kept."""
        at = range(len(self))[index]
        if at not in self._runs:
            self._runs[at] = run_lengths(self.mask(at))
        return self._runs[at]

    def area(self, index: int) -> int:
        """Pixels of a mask."""
        return int(self.run_lengths(index)[1::2].sum())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; masks as uncompressed COCO run lengths (column by column, starting with zeros)."""
        width, height = self.picture.size
        detections = [
            {
                "label": self.prompts[prompt],
                "prompt": int(prompt),
                "score": round(float(score), 6),
                "box": [round(float(value), 3) for value in box],
                "mask": {"size": [height, width], "counts": self.run_lengths(index).tolist()},
            }
            for index, (box, score, prompt) in enumerate(zip(self.boxes, self.scores, self.prompt, strict=True))
        ]
        return {"width": width, "height": height, "prompts": list(self.prompts), "detections": detections}

    def write_json(self, path: str | Path) -> None:
        """``to_dict`` as a file.

        Raises:
            ArtifactError: it cannot be written.
        """
        written(path, lambda file: file.write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8"))

    def write_masks(self, folder: str | Path, stem: str = "mask") -> list[Path]:
        """Each mask as a gray PNG, 255 where it is, named ``STEM_INDEX.png``; the folder is made where there is none.

        Raises:
            ArtifactError: they cannot be written.
        """
        from PIL import Image

        paths = [made_folder(folder) / f"{stem}_{index}.png" for index in range(len(self))]
        for index, path in enumerate(paths):
            written(path, Image.fromarray(self.mask(index).view(np.uint8) * np.uint8(255)).save)
        return paths

    def draw(self, path: str | Path | None = None) -> Image.Image:
        """The picture with masks, boxes and labels over it; also written to ``path`` where one is given.

        Raises:
            ArtifactError: it cannot be written.
        """
        drawn = _overlaid(self)
        if path is not None:
            written(path, drawn.save)
        return drawn

    def _fill(self, index: int, mask: np.ndarray) -> None:
        for rows in self._bands():
            mask[rows] = self._rows(index, rows)

    def _bands(self) -> Iterator[slice]:
        width, height = self.picture.size
        step = max(1, _BAND // width)
        return (slice(start, min(start + step, height)) for start in range(0, height, step))

    def _rows(self, index: int, rows: slice) -> np.ndarray:
        return self._stretched(index, rows) > self.border

    def _stretched(self, index: int, rows: slice) -> np.ndarray:
        width, height = self.picture.size
        return resize_bilinear(self.small_masks[index : index + 1], height, width, rows)[0]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Result(Masks):
    """Detections of all prompts, those of one prompt in the order of the model's queries.

    Attributes:
        boxes: (N, 4) float32, x0, y0, x1, y1 in pixels, as the model gives them.
    """

    boxes: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Clicked(Masks):
    """The masks that clicks gave, three or one for each object; ``prompt`` counts the objects.

    Attributes:
        scores: what the model takes for the overlap of each mask with what is meant.
        logits: (N, h, w) float32, -32 to 32; those of ``best`` can be given as ``mask`` with further clicks.
    """

    logits: np.ndarray

    @functools.cached_property
    def boxes(self) -> np.ndarray:
        """(N, 4) float32, x0, y0, x1, y1 in pixels: what each mask reaches over; zeros where it is empty."""
        boxes = np.zeros((len(self), 4), dtype=np.float32)
        for index in range(len(self)):
            mask = self.mask(index)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            if len(rows):
                boxes[index] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return boxes

    @property
    def best(self) -> Clicked:
        """The mask of each object that scores highest."""
        return self.top(1)

    def top(self, count: int) -> Clicked:
        """The ``count`` masks of each object that score highest, best first.

        Raises:
            SpecError: ``count`` is no whole number from 1.
        """
        count = whole_number(count, "count")
        best = np.lexsort((-self.scores, self.prompt))
        prompt = self.prompt[best]
        return self.chosen(best[np.arange(len(best)) - np.searchsorted(prompt, prompt) < count])

    def chosen(self, indices: np.ndarray) -> Clicked:
        """Those masks, in that order."""
        return replace(self, **{name: getattr(self, name)[indices] for name in _OF_EACH}, _runs={})

    def numbered(self) -> Clicked:
        """The same masks, each of an object of its own."""
        count = len(self)
        return replace(self, prompt=np.arange(count), prompts=tuple(f"object {index + 1}" for index in range(count)))

    def stability_score(self, index: int, offset: float) -> float:
        """The share of a mask that is left where its border moves in, of what there is where it moves out; 0 of nothing.

        SAM's measure, on the mask in the picture's pixels.

        Args:
            offset: by as many logits.
        """
        with np.errstate(over="ignore"):
            low, high = np.array([self.border - offset, self.border + offset]).astype(np.float32)
        inner = outer = 0
        for rows in self._bands():
            values = self._stretched(index, rows)
            inner += int(np.count_nonzero(values > high))
            outer += int(np.count_nonzero(values > low))
        return inner / outer if outer else 0.0


def joined(parts: Sequence[Clicked]) -> Clicked:
    """The masks of all ``parts``, which are of one picture and the same objects, as one result."""
    return replace(parts[0], **{name: np.concatenate([getattr(part, name) for part in parts]) for name in _OF_EACH}, _runs={})


def _overlaid(result: Masks) -> Image.Image:
    from PIL import Image, ImageDraw

    pixels = np.array(result.picture)
    colours = [_colour(index) for index in range(len(result))]
    for rows in result._bands():
        band = pixels[rows].astype(np.float32)
        for index, colour in enumerate(colours):
            mask = result._rows(index, rows)
            band[mask] = band[mask] * 0.5 + np.array(colour, dtype=np.float32) * 0.5
        pixels[rows] = band.round()
    drawn = Image.fromarray(pixels)
    pen = ImageDraw.Draw(drawn)
    line = max(1, round(max(drawn.size) / 400))
    for box, score, label, colour in zip(result.boxes, result.scores, result.labels, colours, strict=True):
        pen.rectangle([float(value) for value in box], outline=colour, width=line)
        x, y = max(float(box[0]), 0.0), max(float(box[1]), 0.0)
        text = f"{label} {score:.2f}"
        pen.rectangle(pen.textbbox((x, y), text), fill=colour)
        pen.text((x, y), text, fill=(0, 0, 0))
    return drawn


def _colour(index: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, 1.0)  # the golden ratio keeps neighbours apart
    return round(red * 255), round(green * 255), round(blue * 255)
