"""What a segmentation found."""

from __future__ import annotations

import colorsys
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3x.errors import ArtifactError, Step

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """Detections of all prompts, those of one prompt together, in the order of the model's queries.

    Attributes:
        masks: (N, height, width) bool. boxes: (N, 4) float32, x0, y0, x1, y1 in pixels. scores: (N,) float32, 0 to 1.
        prompt: (N,) int64, which prompt each detection answers. prompts: the prompts in words.
        picture: the picture they were found in.
    """

    masks: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    prompt: np.ndarray
    prompts: tuple[str, ...]
    picture: Image.Image

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def labels(self) -> list[str]:
        """The prompt of each detection."""
        return [self.prompts[index] for index in self.prompt]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; masks as uncompressed COCO run lengths (column by column, starting with zeros)."""
        detections = [
            {
                "label": self.prompts[index],
                "prompt": int(index),
                "score": round(float(score), 6),
                "box": [round(float(value), 3) for value in box],
                "mask": {"size": list(mask.shape), "counts": run_lengths(mask)},
            }
            for mask, box, score, index in zip(self.masks, self.boxes, self.scores, self.prompt, strict=True)
        ]
        width, height = self.picture.size
        return {"width": width, "height": height, "prompts": list(self.prompts), "detections": detections}

    def write_json(self, path: str | Path) -> None:
        """``to_dict`` as a file."""
        _written(path, lambda file: file.write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8"))

    def draw(self, path: str | Path | None = None) -> Image.Image:
        """The picture with masks, boxes and labels over it; also written to ``path`` where one is given."""
        drawn = _overlaid(self)
        if path is not None:
            _written(path, drawn.save)
        return drawn


def run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of equal values, column by column, the first of zeros (it may be 0): COCO's uncompressed RLE."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [not mask.ravel(order="F")[-1]] if mask.size else [True]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(changes, prepend=0).tolist()


def _written(path: str | Path, write: Any) -> None:
    file = Path(path)
    try:
        write(file)
    except (OSError, ValueError) as error:  # Pillow: unknown extension
        fact = getattr(error, "strerror", None) or str(error)
        raise ArtifactError(
            f"{file} cannot be written ({fact})", remedy="Name a file in a folder that exists.", step=Step.RUN
        ) from error


def _overlaid(result: Result) -> Image.Image:
    from PIL import Image, ImageDraw

    pixels = np.array(result.picture.convert("RGB"), dtype=np.float32)
    colours = [_colour(index) for index in range(len(result))]
    for mask, colour in zip(result.masks, colours, strict=True):
        pixels[mask] = pixels[mask] * 0.5 + np.array(colour, dtype=np.float32) * 0.5
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
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
