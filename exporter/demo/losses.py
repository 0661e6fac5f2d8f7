"""What training minimizes: upstream's losses on matched queries, and two that end with the training.

Matching, boxes, IoU-aware classification and presence are those of ``sam3.train.loss`` (``loss_fns.py``, ``IABCEMdetr``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from sam3x.demo.network import GRID, Answered
from sam3x.demo.scenes import COLOURS, KINDS, TEXTURES

_CLASS, _PRESENCE, _L1, _GIOU = 20.0, 5.0, 5.0, 2.0
_POSITIVE = 1.5  # upstream has 10, of 200 queries: here it would answer twice rather than not at all
_PIXELS, _DICE, _EVERYTHING, _LOOKS, _EXTENTS, _MEANT = 40.0, 20.0, 2.0, 12.0, 15.0, 60.0
_FLAT = 1e-6


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Right answers, N prompts with at most K shapes each.

    Attributes:
        boxes: (N, K, 4) cx, cy, w, h. there: (N, K) which are no padding. coverage: (N, K, 36, 36) of each shape, 0 to 1.
        everything: (N, GRID²) share of each image token that is meant. looks: (pictures, GRID², classes) share of each kind,
            of each colour, of each texture. extents: (pictures, GRID², 5) how much of a token one shape covers, and that
            shape's box: its centre from the token's, width, height.
    """

    boxes: Tensor
    there: Tensor
    coverage: Tensor
    everything: Tensor
    looks: Tensor
    extents: Tensor


LOOKS = (len(KINDS), len(COLOURS), len(TEXTURES))


class Probes(nn.Module):
    """Heads that are thrown away: what each image token shows, and whether it is meant. They teach the encoders first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.looks = nn.Linear(width, 1 + sum(LOOKS))
        self.extents = nn.Linear(width, 4)
        self.meant = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, answered: Answered, wanted: Wanted) -> dict[str, Tensor]:
        image = answered.maps[-1].flatten(2).transpose(1, 2)
        seen = self.looks(image).float()
        kinds, colours, textures = wanted.looks.split(LOOKS, dim=-1)
        covered = kinds.sum(dim=-1, keepdim=True)
        first, second, third = seen.split([1 + LOOKS[0], LOOKS[1], LOOKS[2]], dim=-1)
        nothing, shown = first.log_softmax(dim=-1).split([1, LOOKS[0]], dim=-1)
        crossed = -((1 - covered) * nothing).mean()
        for chances, share in ((shown, kinds), (second.log_softmax(dim=-1), colours), (third.log_softmax(dim=-1), textures)):
            crossed = crossed - (share * chances).sum() / covered.sum().clamp(min=1)
        share, boxes = wanted.extents.split([1, 4], dim=-1)
        off = ((self.extents(image) - boxes).abs() * share).sum() / share.sum().clamp(min=1)
        meant = self.meant(answered.encoded).squeeze(-1).float()
        return {
            "looks": _LOOKS * crossed,
            "extents": _EXTENTS * off,
            "meant": _MEANT * functional.binary_cross_entropy_with_logits(meant, wanted.everything),
        }


def corners(boxes: Tensor) -> Tensor:
    """cx, cy, w, h → x0, y0, x1, y1."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1)


def overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU of boxes as corners, broadcast against each other."""
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    areas = (first[..., 2:] - first[..., :2]).prod(dim=-1) + (second[..., 2:] - second[..., :2]).prod(dim=-1)
    union = (areas - shared).clamp(min=_FLAT)
    hull = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    around = hull.prod(dim=-1).clamp(min=_FLAT)
    return shared / union, shared / union - (around - union) / around


@torch.no_grad()
def matched(answered: Answered, wanted: Wanted) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each decoder layer the prompt, query and shape of each pair, with Hungarian matching; costs as upstream's matcher."""
    counts = wanted.there.sum(dim=1).tolist()
    layers = []
    for logits, boxes in zip(answered.logits, answered.boxes, strict=True):
        chance = logits.sigmoid()
        focal = 0.25 * (1 - chance) ** 2 * -(chance + 1e-8).log() - 0.75 * chance**2 * -(1 - chance + 1e-8).log()
        distance = (boxes[:, :, None] - wanted.boxes[:, None]).abs().sum(dim=-1)
        _, wide = overlaps(corners(boxes)[:, :, None], corners(wanted.boxes)[:, None])
        costs = (2 * focal[..., None] + _L1 * distance - _GIOU * wide).numpy()
        rows: list[int] = []
        queries: list[int] = []
        shapes: list[int] = []
        for row, count in enumerate(counts):
            if count:
                query, shape = linear_sum_assignment(costs[row, :, :count])
                rows += [row] * count
                queries += query.tolist()
                shapes += shape.tolist()
        layers.append((torch.tensor(rows), torch.tensor(queries), torch.tensor(shapes)))
    return layers


def set_losses(answered: Answered, wanted: Wanted, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """Classification, presence and boxes of every decoder layer; the last counts as much as the others."""
    present = wanted.there.any(dim=1)
    objects = wanted.there.sum().clamp(min=1)
    total = {name: answered.logits.new_zeros(()) for name in ("class", "presence", "l1", "giou")}
    for layer, (rows, queries, shapes) in enumerate(pairs):
        logits, boxes = answered.logits[layer], answered.boxes[layer][rows, queries]
        target = wanted.boxes[rows, shapes]
        overlap, wide = overlaps(corners(boxes), corners(target))
        chance = logits.sigmoid()
        soft = torch.zeros_like(logits)
        hit = torch.zeros_like(logits)
        with torch.no_grad():
            hit[rows, queries] = 1
            soft[rows, queries] = (chance[rows, queries] ** 0.25 * overlap**0.75).clamp(min=0.01)
        positive = functional.binary_cross_entropy_with_logits(logits, soft, reduction="none") * hit * _POSITIVE
        negative = functional.binary_cross_entropy_with_logits(logits, hit, reduction="none") * (1 - hit) * chance
        total["class"] = total["class"] + _CLASS * ((positive + negative) * present[:, None]).mean()
        total["presence"] = total["presence"] + _PRESENCE * functional.binary_cross_entropy_with_logits(
            answered.presence[layer], present.float()
        )
        total["l1"] = total["l1"] + _L1 * (boxes - target).abs().sum() / objects
        total["giou"] = total["giou"] + _GIOU * (1 - wide).sum() / objects
    return total


def mask_losses(logits: Tensor, everything: Tensor, coverage: Tensor, there: Tensor) -> dict[str, Tensor]:
    """Pixels and dice of matched queries, and of everything that is meant.

    Args:
        logits: (M, K, 36, 36). everything: (M, 1, 36, 36) logits. coverage: (M, K, 36, 36), 0 to 1. there: (M, K).
    """
    own, target = logits[there].flatten(1), coverage[there].flatten(1)
    union = (coverage * there[..., None, None]).sum(dim=1).clamp(max=1).flatten(1)
    whole = everything.flatten(1)
    return {
        "pixels": _PIXELS * functional.binary_cross_entropy_with_logits(own, target),
        "dice": _DICE * _dice(own, target),
        "everything": _EVERYTHING * (functional.binary_cross_entropy_with_logits(whole, union) + _dice(whole, union)),
    }


def _dice(logits: Tensor, target: Tensor) -> Tensor:
    chance = logits.sigmoid()
    return (1 - (2 * (chance * target).sum(dim=1) + 1) / (chance.sum(dim=1) + target.sum(dim=1) + 1)).mean()


def tokens(coverage: Tensor) -> Tensor:
    """(…, size, size) → (…, GRID²), the mean over each image token."""
    size = coverage.shape[-1] // GRID
    return coverage.unflatten(-1, (GRID, size)).unflatten(-3, (GRID, size)).mean(dim=(-3, -1)).flatten(-2)
