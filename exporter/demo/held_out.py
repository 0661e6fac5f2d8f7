"""The held-out set and the validation set: seeds that no training draws, combinations that no training picture holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sam3x.demo.questions import held_out_words, meant
from sam3x.demo.scenes import SIZE, Drawn, Scene, draw, scene
from sam3x.fidelity.cases import Case
from sam3x.fidelity.score import Asked, encode

PICTURES = 500
PROMPTS = 6
"""Phrases asked of each picture; half of them mean something in it, as far as there is as much."""

HELD_OUT, VALIDATION = 1, 2
"""The first number of every seed of a set; training begins its with 0. Figures are of the first, choices by the second."""

_LEFT_OUT = 0.25  # share of the shapes that are of combinations left out in training


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Held:
    """A held-out picture, drawn, and what is asked of it."""

    scene: Scene
    drawn: Drawn
    asked: tuple[Asked, ...]


def held_out(index: int, size: int = SIZE, of: int = HELD_OUT) -> Held:
    """Picture ``index`` of the set ``of``, in ``size`` by ``size`` pixels."""
    rng = np.random.default_rng([of, index])
    made = scene(rng, left_out=_LEFT_OUT)
    drawn = draw(made, size)
    runs, boxes = encode(drawn.masks), drawn.boxes
    asked = []
    for text in held_out_words(rng, made, PROMPTS):
        own = [item for item in meant(made, text) if drawn.masks[item].any()]
        asked.append(
            Asked(
                picture=index,
                phrase=text,
                size=(size, size),
                boxes=boxes[own],
                masks=[runs[item] for item in own],
                crowd=np.zeros(len(own), dtype=bool),
            )
        )
    return Held(scene=made, drawn=drawn, asked=tuple(asked))


def cases(count: int | None = None) -> list[Case]:
    """The first ``count`` pictures of the set, or all ``PICTURES``, as the model sees them."""
    held = (held_out(index, SIZE) for index in range(min(count or PICTURES, PICTURES)))
    return [Case(picture=one.drawn.pixels, asked=one.asked) for one in held]
