"""Canonical attention to one that keeps a budget of memory where TensorRT has no fused kernel for it."""

from __future__ import annotations

import torch
from torch.fx import Node

from sam3x.passes.attention.guard import Sdpa
from sam3x.passes.attention.tile_attention import TileAttentionPass
from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.emitter import Emitter

UNLIMITED = 2**62
"""The budget of attention that TensorRT fuses."""


class LegalizeAttentionForTrtPass(TileAttentionPass):
    """Every ``aten.scaled_dot_product_attention`` → ``sam3x::tiled_attention``, rows that see no key repaired on the mask.

    TensorRT's attention layer gives no promise for such rows, and takes a mask of four dimensions only. In half precision the
    layer is fused and its scores are never in memory; in float32 they are, and ``budget`` bounds them.

    Args:
        budget: bytes that the scores of one attention may take where it is not fused.
        explicit: whether none is fused, in half precision neither.
    """

    name = "legalize_attention_for_trt"
    run_after = ("canonicalize_attention", "simplify_attention_masks", "convert_precision")

    def __init__(self, budget: int, *, explicit: bool = False) -> None:
        super().__init__(budget)
        self.explicit = explicit

    def budget_of(self, found: Sdpa) -> int:
        rank = found.query.meta["val"].dim()
        if rank != 4:
            raise NoMatchError(f"{rank} dimensions, not 4")
        return self.budget if self.explicit or found.query.meta["val"].dtype is torch.float32 else UNLIMITED

    def mask(self, emit: Emitter, found: Sdpa) -> Node | None:
        mask = found.mask
        while mask is not None and mask.meta["val"].dim() < 4:
            mask = emit(torch.ops.aten.unsqueeze.default, mask, 0)
        return mask
