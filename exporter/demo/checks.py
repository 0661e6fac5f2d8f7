"""``python -m sam3x.demo.checks``: how good the small model is on its held-out pictures, in eager torch; training asks too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sam3x.demo.batches import pixels_of
from sam3x.demo.held_out import PICTURES, Held, held_out
from sam3x.demo.losses import corners
from sam3x.demo.network import Asked, answer, masks, tokenize
from sam3x.demo.network import model as kept_model
from sam3x.demo.questions import left_out
from sam3x.demo.scenes import SIZE
from sam3x.fidelity.score import Answers, Figures, encode, score

THRESHOLD = 0.3
"""Transformers' own, of the curve of a training; the finished model has its own, see ``sam3x.demo.threshold``."""

_FAINT = 0.02  # answers below count for nothing


def check(model: Any, held: Sequence[Held]) -> Figures:
    """The figures of ``model`` on ``held``."""
    return score([item for one in held for item in one.asked], answers(model, held), THRESHOLD)


@torch.no_grad()
def answers(model: Any, held: Sequence[Held], pictures: int = 16) -> list[Answers]:
    """What ``model`` finds, ``pictures`` at a time: of every picture of ``held`` all that it is asked, in order."""
    model.eval()
    found: list[Answers] = []
    for start in range(0, len(held), pictures):
        part = held[start : start + pictures]
        flat = [(picture, item.phrase) for picture, one in enumerate(part) for item in one.asked]
        ids, valid = tokenize([phrase for _, phrase in flat])
        none = torch.zeros((len(flat), 1), dtype=torch.bool)
        asked = Asked(
            ids=torch.from_numpy(ids),
            valid=torch.from_numpy(valid),
            boxes=torch.full((len(flat), 1, 4), 0.5),
            labels=torch.zeros((len(flat), 1), dtype=torch.long),
            given=none,
            picture=torch.tensor([picture for picture, _ in flat]),
        )
        found += _answers(model, pixels_of([item.drawn for item in part]), asked)
    return found


def _answers(model: Any, pixels: Tensor, asked: Asked) -> list[Answers]:
    answered = answer(model, pixels, asked)
    scores = answered.logits[-1].sigmoid() * answered.presence[-1].sigmoid()[:, None]
    order = scores.argsort(dim=1, descending=True)[:, :10]
    every = torch.arange(len(scores))
    logits, _ = masks(model, answered, asked.picture, every, order)
    whole = functional.interpolate(logits.sigmoid(), size=(SIZE, SIZE), mode="bilinear", align_corners=False) > 0.5
    boxes = corners(answered.boxes[-1]) * SIZE
    found = []
    for row in range(len(scores)):
        kept = order[row][scores[row, order[row]] > _FAINT]
        found.append(
            Answers(
                scores=scores[row, kept].numpy(),
                boxes=boxes[row, kept].numpy().astype(np.float64),
                masks=encode(whole[row, : len(kept)].numpy()),
            )
        )
    return found


def main() -> None:
    """Print the figures of the kept weights: of all phrases, and apart of those that join what no training picture joins."""
    trained: Any = kept_model()
    held = [held_out(index) for index in range(PICTURES)]
    asked, found = [item for one in held for item in one.asked], answers(trained, held)
    threshold = trained.config.detection_threshold
    for name, wanted in (("all phrases", (True, False)), ("left-out combinations", (True,)), ("all others", (False,))):
        rows = [index for index, item in enumerate(asked) if left_out(item.phrase) in wanted]
        figures = asdict(score([asked[row] for row in rows], [found[row] for row in rows], threshold))
        told = (f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items())
        print(f"{name}: {', '.join(told)}")


if __name__ == "__main__":
    main()
