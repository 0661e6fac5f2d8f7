"""Training batches, drawn as they are needed: the same numbers for the same seed and step, so that a run can be resumed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sam3x.demo.losses import Wanted, tokens
from sam3x.demo.network import GRID, Asked, tokenize
from sam3x.demo.questions import Question, fractions, questions
from sam3x.demo.scenes import COLOURS, KINDS, SIZE, TEXTURES, Drawn, Scene, draw, scene

_SEEDS = 0  # the first number of every training seed; the held-out set begins its with 1
_OTHER = 0.3  # share of shapes whose colour has no name
_SHAKE = 0.06  # of example boxes, as people draw them: at most this share of their sides


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures (pictures, 3, 72, 72), what is asked of them, and what is right."""

    pixels: Tensor
    asked: Asked
    wanted: Wanted


def batch(seed: int, step: int, pictures: int, prompts: int) -> Batch:
    """Batch ``step``: ``pictures`` new ones with ``prompts`` questions each."""
    rng = np.random.default_rng([_SEEDS, seed, step])
    scenes = [scene(rng, other=_OTHER) for _ in range(pictures)]
    return batch_of(rng, scenes, [questions(rng, item, prompts) for item in scenes])


def batch_of(rng: np.random.Generator, scenes: list[Scene], asked: list[list[Question]]) -> Batch:
    """Those scenes and questions as tensors."""
    drawn = [draw(item, SIZE) for item in scenes]
    coverage = [torch.from_numpy(item.coverage) for item in drawn]
    small = [item.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean(dim=(-3, -1)) for item in coverage]
    shares = [tokens(item) for item in coverage]
    boxes = [fractions(item.boxes, SIZE) for item in drawn]
    flat = [(picture, question) for picture, several in enumerate(asked) for question in several]
    most = max(1, max(len(question.wanted) for _, question in flat))
    examples = max(1, max(len(question.examples) for _, question in flat))
    count = len(flat)
    given = torch.zeros((count, examples), dtype=torch.bool)
    drawn_boxes, labels = torch.full((count, examples, 4), 0.5), torch.zeros((count, examples), dtype=torch.long)
    target, there = torch.full((count, most, 4), 0.5), torch.zeros((count, most), dtype=torch.bool)
    masks = torch.zeros((count, most, *small[0].shape[-2:]))
    everything = torch.zeros((count, shares[0].shape[-1]))
    for row, (picture, question) in enumerate(flat):
        for place, (index, label) in enumerate(zip(question.examples, question.labels, strict=True)):
            drawn_boxes[row, place] = torch.from_numpy(_shaken(rng, boxes[picture][index]))
            labels[row, place], given[row, place] = int(label), True
        for place, index in enumerate(question.wanted):
            target[row, place] = torch.from_numpy(boxes[picture][index])
            masks[row, place], there[row, place] = small[picture][index], True
            everything[row] += shares[picture][index]
    ids, valid = tokenize([question.text for _, question in flat])
    return Batch(
        pixels=pixels_of(drawn),
        asked=Asked(
            ids=torch.from_numpy(ids),
            valid=torch.from_numpy(valid),
            boxes=drawn_boxes,
            labels=labels,
            given=given,
            picture=torch.tensor([picture for picture, _ in flat]),
        ),
        wanted=Wanted(
            boxes=target,
            there=there,
            coverage=masks,
            everything=everything.clamp(max=1),
            looks=torch.stack([_looks(item, share) for item, share in zip(scenes, shares, strict=True)]),
            extents=torch.stack([_extents(box, share) for box, share in zip(boxes, shares, strict=True)]),
        ),
    )


def pixels_of(drawn: list[Drawn]) -> Tensor:
    """Pictures as the runtime gives them to the vision encoder: (N, 3, size, size) from -1 to 1."""
    stacked = torch.from_numpy(np.stack([item.pixels for item in drawn]))
    return stacked.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def _shaken(rng: np.random.Generator, box: np.ndarray) -> np.ndarray:
    scale = rng.uniform(-_SHAKE, _SHAKE, 4)
    return (box + scale * np.tile(box[2:], 2)).astype(np.float32)


def _looks(made: Scene, shares: Tensor) -> Tensor:
    """(GRID², classes): share of each kind, colour and texture in each image token."""
    columns = []
    for names, attribute in ((KINDS, "kind"), (tuple(COLOURS), "colour"), (TEXTURES, "texture")):
        own = torch.zeros((len(names), shares.shape[-1]))
        for shape, share in zip(made.shapes, shares, strict=True):
            if getattr(shape, attribute) in names:
                own[names.index(getattr(shape, attribute))] += share
        columns.append(own)
    return torch.cat(columns).T


def _extents(boxes: np.ndarray, shares: Tensor) -> Tensor:
    """(GRID², 5), see ``Wanted``."""
    most, index = shares.max(dim=0)
    at = (torch.arange(GRID) + 0.5) / GRID
    y, x = torch.meshgrid(at, at, indexing="ij")
    own = torch.from_numpy(boxes)[index]
    own[:, :2] -= torch.stack([x.flatten(), y.flatten()], dim=1)
    return torch.cat([most[:, None], own], dim=1)
