"""What can be asked of a scene, and which of its shapes are meant: words, boxes as examples, both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sam3x.demo.scenes import COLOURS, KINDS, LEFT_OUT, OTHER, TEXTURES, Scene, Shape

ANY = "shape"
"""The word for every kind: ``red shape``."""

BOXES_ALONE = "visual"
"""What upstream says in place of words where only boxes are given."""

WORDS = (ANY, *KINDS, *COLOURS, *TEXTURES)
_STRANGE = ("dog", "car", "cloud", "pentagon", "orange", "furry")  # all the same to the tokenizer: unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt and its answer.

    Attributes:
        text: words, or ``BOXES_ALONE``. examples: indices of the shapes that are boxed.
        labels: one an example, True for what is wanted. wanted: indices of the shapes that are meant.
    """

    text: str
    examples: tuple[int, ...] = ()
    labels: tuple[bool, ...] = ()
    wanted: tuple[int, ...]


def plural(word: str) -> str:
    """``cross`` → ``crosses``."""
    return f"{word}es" if word.endswith("s") else f"{word}s"


def meant(scene: Scene, text: str) -> tuple[int, ...]:
    """Indices of the shapes that ``text`` describes: all of its words fit. An unknown word fits none."""
    return tuple(index for index, shape in enumerate(scene.shapes) if all(_fits(shape, word) for word in text.split()))


def _fits(shape: Shape, word: str) -> bool:
    kinds = (shape.kind, ANY)
    return word != OTHER and word in (shape.colour, shape.texture, *kinds, *map(plural, kinds))


def alike(scene: Scene, index: int) -> tuple[int, ...]:
    """What an example means: the shapes of its kind and colour."""
    one = scene.shapes[index]
    if one.colour == OTHER:  # each is a colour of its own
        return (index,)
    return tuple(i for i, other in enumerate(scene.shapes) if (other.kind, other.colour) == (one.kind, one.colour))


def phrases() -> list[str]:
    """Every phrase of kind, colour, texture: what a picture may be asked."""
    kinds = [ANY, *KINDS]
    return [*kinds, *(f"{first} {kind}" for first in (*COLOURS, *TEXTURES) for kind in kinds)]


def questions(rng: np.random.Generator, scene: Scene, count: int, *, boxes: float = 0.3) -> list[Question]:
    """``count`` questions by lot: what is there, what is not, what is nearly there.

    Args:
        boxes: share of those with examples, alone or beside words.
    """
    return [_boxed(rng, scene) if rng.random() < boxes else _worded(rng, scene) for _ in range(count)]


def _worded(rng: np.random.Generator, scene: Scene) -> Question:
    text = _described(rng, scene.shapes[rng.integers(len(scene.shapes))])
    if rng.random() < 0.4:
        text = _absent(rng, scene)
    return Question(text=_varied(rng, text), wanted=meant(scene, text))


def _described(rng: np.random.Generator, shape: Shape) -> str:
    """Words for a shape: kind, colour, both, texture."""
    forms = (
        shape.kind,
        f"{shape.colour} {shape.kind}",
        f"{shape.colour} {ANY}",
        f"{shape.texture} {shape.kind}",
        f"{shape.texture} {shape.colour} {shape.kind}",
        f"{shape.texture} {ANY}",
        ANY,
    )
    text = forms[rng.choice(len(forms), p=(0.27, 0.32, 0.13, 0.13, 0.06, 0.05, 0.04))]
    return " ".join(word for word in text.split() if word != OTHER)


def _absent(rng: np.random.Generator, scene: Scene) -> str:
    """Words for nothing in the scene: of parts that are there, not together; of others; unknown ones."""
    for _ in range(20 if rng.random() < 0.8 else 0):
        seen = [scene.shapes[index] for index in rng.integers(len(scene.shapes), size=3)]
        near = rng.random() < 0.6
        text = _described(
            rng,
            Shape(
                kind=seen[0].kind if near else str(rng.choice(KINDS)),
                colour=seen[1].colour if near and seen[1].colour != OTHER else str(rng.choice(list(COLOURS))),
                texture=seen[2].texture if near else str(rng.choice(TEXTURES)),
                x=0,
                y=0,
                radius=0,
            ),
        )
        if not meant(scene, text) and not left_out(text):  # else it would be learnt that there are none
            return text
    return _strange(rng, scene)


def left_out(text: str) -> bool:
    """Whether a phrase has a colour and a kind, in the plural or not, that no training picture joins."""
    words = set(text.split())
    return any(colour in words and words & {kind, plural(kind)} for colour, kind in LEFT_OUT)


def _strange(rng: np.random.Generator, scene: Scene) -> str:
    """Words with one that is unknown."""
    word = str(rng.choice(_STRANGE))
    shape = scene.shapes[rng.integers(len(scene.shapes))]
    colour = str(rng.choice(list(COLOURS))) if shape.colour == OTHER else shape.colour
    return str(rng.choice([word, f"{colour} {word}", f"{word} {shape.kind}"]))


def _varied(rng: np.random.Generator, text: str) -> str:
    """In the plural at times."""
    *rest, last = text.split()
    return " ".join([*rest, plural(last)]) if rng.random() < 0.1 and last in (ANY, *KINDS) else text


def _boxed(rng: np.random.Generator, scene: Scene) -> Question:
    example = int(rng.integers(len(scene.shapes)))
    same = alike(scene, example)
    others = [index for index in range(len(scene.shapes)) if index not in same]
    form = rng.random()
    if form < 0.5:  # boxes alone, at times with an example of what is not wanted
        more = [int(index) for index in rng.permutation([index for index in same if index != example])[:1]]
        positive = (example, *(more if rng.random() < 0.3 else ()))
        negative = (int(rng.choice(others)),) if others and rng.random() < 0.3 else ()
        labels = (True,) * len(positive) + (False,) * len(negative)
        return Question(text=BOXES_ALONE, examples=(*positive, *negative), labels=labels, wanted=same)
    shape = scene.shapes[example]
    if form < 0.8:  # words but what is like the example
        wide = [shape.kind, ANY, f"{shape.texture} {ANY}", *([] if shape.colour == OTHER else [f"{shape.colour} {ANY}"])]
        found = [(text, tuple(index for index in meant(scene, text) if index not in same)) for text in wide]
        useful = [item for item in found if item[1]]
        text, wanted = (useful or found)[int(rng.integers(len(useful or found)))]
        return Question(text=text, examples=(example,), labels=(False,), wanted=wanted)
    text = shape.kind if shape.colour == OTHER else f"{shape.colour} {shape.kind}"  # words, and an example of the same
    return Question(text=text, examples=(example,), labels=(True,), wanted=meant(scene, text))


def fractions(boxes: np.ndarray, size: int) -> np.ndarray:
    """(N, 4) of x0, y0, x1, y1 in pixels → (N, 4) float32 of cx, cy, w, h as fractions of the picture."""
    low, high = boxes[:, :2] / size, boxes[:, 2:] / size
    return np.concatenate([(low + high) / 2, high - low], axis=1).astype(np.float32)


def held_out_words(rng: np.random.Generator, scene: Scene, count: int) -> Sequence[str]:
    """``count`` different phrases to ask of a held-out picture: half of them describe something there, as far as there is."""
    every = phrases()
    order = [every[index] for index in rng.permutation(len(every))]
    present = [text for text in order if meant(scene, text)]
    shape_words = {word for shape in scene.shapes for word in (shape.kind, shape.colour, shape.texture)}
    absent = sorted((text for text in order if not meant(scene, text)), key=lambda text: -len(shape_words & set(text.split())))
    near, far = absent[: len(absent) // 3], absent[len(absent) // 3 :]
    there = present[: (count + 1) // 2]
    nothing = [*[near[index] for index in rng.permutation(len(near))], *far]
    return sorted([*there, *nothing[: count - len(there)]])
