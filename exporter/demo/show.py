"""The picture of ``sam3x demo``: one scene, asked in several ways, each answer drawn beside the others. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sam3x.demo.scenes import Drawn, Scene, Shape, draw
from sam3x.runtime.output import written
from sam3x.runtime.result import Result
from sam3x.runtime.segmenter import Segmenter

if TYPE_CHECKING:
    from PIL import Image

SIZE = 288
"""Side in pixels in which the scene is drawn; the model sees a quarter of that."""

SCENE = Scene(
    shapes=(
        Shape(kind="circle", colour="red", texture="plain", x=0.22, y=0.24, radius=0.16),
        Shape(kind="square", colour="blue", texture="striped", x=0.77, y=0.22, radius=0.18, angle=0.2),
        Shape(kind="star", colour="yellow", texture="plain", x=0.52, y=0.5, radius=0.18, angle=-0.2),
        Shape(kind="triangle", colour="green", texture="plain", x=0.2, y=0.62, radius=0.17, angle=0.1),
        Shape(kind="circle", colour="red", texture="dotted", x=0.8, y=0.58, radius=0.15),
        Shape(kind="star", colour="purple", texture="striped", x=0.3, y=0.87, radius=0.14, angle=0.3),
        Shape(kind="circle", colour="blue", texture="plain", x=0.68, y=0.85, radius=0.14),
    ),
    grays=(80.0, 125.0),
    noise=3.0,
)
"""Drawn by hand for the demo; no training picture has seven shapes."""

TEXTS = ("red circle", "star", "striped shape", "dog")
"""What is asked in words; the last is a word that the model has never been taught."""

_BAR, _GAP = 22, 6


def scene() -> Drawn:
    """The demo's scene in pixels."""
    return draw(SCENE, SIZE)


def answers(segmenter: Segmenter, picture: Drawn) -> list[tuple[str, Result]]:
    """(what was asked, what was found): words, a box as an example, words without what is like a box."""
    from PIL import Image

    image = segmenter.encode(Image.fromarray(picture.pixels))
    boxes = picture.boxes.tolist()
    found = [(f'"{text}"', segmenter.segment(image, text=text)) for text in TEXTS]
    found.append(("a box around a red circle", segmenter.segment(image, boxes=[boxes[0]])))
    found.append(('"star" but a box', segmenter.segment(image, text="star", boxes=[boxes[2]], labels=[False])))
    return found


def sheet(found: list[tuple[str, Result]]) -> Image.Image:
    """Every answer over the picture, three in a row, what was asked and how much was found above it."""
    from PIL import Image, ImageDraw

    columns = 3
    rows = -(-len(found) // columns)
    width, height = SIZE + _GAP, SIZE + _BAR + _GAP
    page = Image.new("RGB", (columns * width - _GAP, rows * height - _GAP), "white")
    pen = ImageDraw.Draw(page)
    for index, (asked, result) in enumerate(found):
        left, top = index % columns * width, index // columns * height
        count = len(result)
        pen.text((left + 4, top + 4), f"{asked}: {count or 'nothing'} found", fill="black", font_size=13)
        page.paste(result.draw(), (left, top + _BAR))
    return page


def write(page: Image.Image, path: Path) -> None:
    """The page as a PNG of few colours.

    Raises:
        ArtifactError: it cannot be written.
    """
    written(path, lambda file: page.quantize(128).save(file, optimize=True))
