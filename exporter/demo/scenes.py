"""Pictures of shapes: a scene is a list of shapes, and is drawn in any size. numpy and Pillow alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZE = 72
"""Side in pixels of the pictures that the model is trained on and takes."""

KINDS = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (215, 45, 40),
    "green": (45, 160, 60),
    "blue": (45, 85, 215),
    "yellow": (235, 210, 50),
    "purple": (150, 60, 185),
    "white": (240, 240, 240),
}
OTHER = "other"
"""Every colour that has no name here; its ``tint`` is the colour."""

TEXTURES = ("plain", "striped", "dotted")
LEFT_OUT = frozenset({("red", "star"), ("green", "circle"), ("blue", "cross"), ("yellow", "square"), ("purple", "triangle")})
"""Pairs of colour and kind that no training picture holds."""

RADII = (0.15, 0.24)  # of a shape's circumscribed circle, as fractions of the picture
_MOST = 6  # shapes in a picture
_OVERSAMPLING = 4
_SHADE = 0.45  # of the dark stripes and dots


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One shape; ``x``, ``y`` (its centre) and ``radius`` are fractions of the picture, ``angle`` is in radians."""

    kind: str
    colour: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Shapes from the back to the front, over a gray that runs from one corner to the other."""

    shapes: tuple[Shape, ...]
    grays: tuple[float, float] = (90.0, 110.0)
    noise: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawn:
    """A scene in pixels: ``pixels`` (size, size, 3) uint8; ``coverage`` (shapes, size, size) float32, what is seen of each."""

    pixels: np.ndarray
    coverage: np.ndarray

    @property
    def masks(self) -> np.ndarray:
        """(shapes, size, size) bool."""
        return self.coverage > 0.5

    @property
    def boxes(self) -> np.ndarray:
        """(shapes, 4) float32: x0, y0, x1, y1 of the visible parts, in pixels."""
        return np.array([box_of(mask) for mask in self.masks], dtype=np.float32).reshape(-1, 4)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 in pixels of what is set in ``mask``; zeros where nothing is."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if len(rows) else (0, 0, 0, 0)


def scene(rng: np.random.Generator, *, left_out: float = 0.0, other: float = 0.0) -> Scene:
    """A scene drawn by lot.

    Args:
        left_out: share of the shapes that are one of ``LEFT_OUT``. 0, as in training: none is.
        other: share of the shapes whose colour has no name, so that kinds are not told by colours.
    """
    shapes: list[Shape] = []
    for _ in range(int(rng.integers(1, _MOST + 1))):
        placed = _place(rng, shapes)
        if placed is None:
            break
        colour, kind = _look(rng, shapes, left_out)
        tint = rng.uniform(-18, 18, 3)
        if other and rng.random() < other:
            colour, tint = OTHER, _unnamed(rng)
        shapes.append(
            Shape(
                kind=kind,
                colour=colour,
                texture=str(rng.choice(TEXTURES, p=(0.5, 0.25, 0.25))),
                x=placed[0],
                y=placed[1],
                radius=placed[2],
                angle=float(rng.uniform(-0.5, 0.5)),
                tint=tuple(float(value) for value in tint),  # type: ignore[arg-type]
            )
        )
    grays = rng.uniform(50, 140, 2)
    return Scene(
        shapes=tuple(shapes),
        grays=(float(grays[0]), float(grays[1])),
        noise=float(rng.uniform(0, 6)),
        seed=int(rng.integers(1 << 31)),
    )


def _place(rng: np.random.Generator, shapes: list[Shape]) -> tuple[float, float, float] | None:
    """Centre and radius of one more shape that hides no other by much; None where there is no room."""
    for _ in range(20):
        radius = float(rng.uniform(*RADII))
        x, y = (float(value) for value in rng.uniform(0.9 * radius, 1 - 0.9 * radius, 2))
        if all(np.hypot(x - other.x, y - other.y) > 0.72 * (radius + other.radius) for other in shapes):
            return x, y, radius
    return None


def _look(rng: np.random.Generator, shapes: list[Shape], left_out: float) -> tuple[str, str]:
    """Colour and kind: often those of a shape that is there, so that a word means several."""
    if rng.random() < left_out:
        return sorted(LEFT_OUT)[rng.integers(len(LEFT_OUT))]
    named = [shape for shape in shapes if shape.colour != OTHER]
    while True:
        colour, kind = str(rng.choice(list(COLOURS))), str(rng.choice(KINDS))
        if named and rng.random() < 0.5:
            other = named[rng.integers(len(named))]
            colour = other.colour if rng.random() < 0.6 else colour
            kind = other.kind if rng.random() < 0.6 else kind
        if (colour, kind) not in LEFT_OUT:
            return colour, kind


def _unnamed(rng: np.random.Generator) -> np.ndarray:
    """A colour that is far from every one that has a name, and from gray."""
    named = np.array(list(COLOURS.values()))
    while True:
        colour = rng.uniform(20, 240, 3)
        if np.linalg.norm(named - colour, axis=1).min() > 75 and np.ptp(colour) > 60:
            return colour


def draw(scene: Scene, size: int) -> Drawn:
    """The scene in ``size`` by ``size`` pixels; edges are smooth, the background is noisy."""
    ramp = np.add.outer(np.arange(size), np.arange(size)) / max(1, 2 * size - 2)
    gray = scene.grays[0] + (scene.grays[1] - scene.grays[0]) * ramp
    pixels = np.repeat(gray[..., None], 3, axis=2).astype(np.float32)
    coverage = np.zeros((len(scene.shapes), size, size), dtype=np.float32)
    for index, shape in enumerate(scene.shapes):
        rows, columns, alpha, shade = _painted(shape, size)
        colour = np.array(COLOURS.get(shape.colour, (0, 0, 0)), dtype=np.float32) + np.array(shape.tint, dtype=np.float32)
        here = pixels[rows, columns]
        here += alpha[..., None] * (shade[..., None] * colour - here)
        coverage[:index, rows, columns] *= 1 - alpha
        coverage[index, rows, columns] = alpha
    if scene.noise:
        pixels += np.random.default_rng(scene.seed).normal(0, scene.noise, pixels.shape).astype(np.float32)
    return Drawn(pixels=np.clip(pixels.round(), 0, 255).astype(np.uint8), coverage=coverage)


def _painted(shape: Shape, size: int) -> tuple[slice, slice, np.ndarray, np.ndarray]:
    """Where a shape lies, how much of each pixel it covers (0 to 1), and how bright its colour is there."""
    from PIL import Image, ImageDraw

    x, y, radius = shape.x * size, shape.y * size, shape.radius * size
    left, top = max(0, int(x - radius) - 1), max(0, int(y - radius) - 1)
    right, bottom = min(size, int(x + radius) + 2), min(size, int(y + radius) + 2)
    width, height = right - left, bottom - top
    canvas = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    corners = _outline(shape) * radius + np.array([x - left, y - top])
    ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in (corners * _OVERSAMPLING - 0.5).tolist()], fill=255)
    alpha = np.asarray(canvas.reduce(_OVERSAMPLING), dtype=np.float32) / 255
    across, down = np.meshgrid(np.arange(left, right) + 0.5 - x, np.arange(top, bottom) + 0.5 - y)
    return slice(top, bottom), slice(left, right), alpha, _texture(shape, across / radius, down / radius)


def _texture(shape: Shape, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Brightness, 0 to 1, at places given in radii from the centre."""
    if shape.texture == "plain":
        return np.ones(across.shape, dtype=np.float32)
    turn = shape.angle + 0.6
    first, second = across * np.cos(turn) + down * np.sin(turn), down * np.cos(turn) - across * np.sin(turn)
    if shape.texture == "striped":
        wave = np.sin(first * 2 * np.pi / 0.5)
    else:
        wave = np.sin(first * 2 * np.pi / 0.55) * np.sin(second * 2 * np.pi / 0.55) * 2 - 0.3
    return (1 - (1 - _SHADE) / (1 + np.exp(-wave * 6))).astype(np.float32)


def _outline(shape: Shape) -> np.ndarray:
    """Corners of a shape of radius 1 around 0, turned by its angle: (N, 2)."""
    turns = {"circle": (64, 1.0), "square": (4, 1.0), "triangle": (3, 1.0), "star": (10, 0.45)}
    if shape.kind == "cross":
        arm, end = 0.32, 0.95
        corners = np.array(
            [(-arm, -end), (arm, -end), (arm, -arm), (end, -arm), (end, arm), (arm, arm),
             (arm, end), (-arm, end), (-arm, arm), (-end, arm), (-end, -arm), (-arm, -arm)]
        )  # fmt: skip
    else:
        count, inner = turns[shape.kind]
        start = np.pi / 4 if shape.kind == "square" else -np.pi / 2
        angles = start + 2 * np.pi * np.arange(count) / count
        far = np.where(np.arange(count) % 2 == 0, 1.0, inner)
        corners = np.stack([np.cos(angles), np.sin(angles)], axis=1) * far[:, None]
    cos, sin = np.cos(shape.angle), np.sin(shape.angle)
    return corners @ np.array([[cos, sin], [-sin, cos]])
