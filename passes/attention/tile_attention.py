"""Attention that may need more memory than it is allowed, marked to be computed a tile of queries at a time."""

from __future__ import annotations

import math

from torch.fx import Node

from sam3x.passes.attention.guard import Sdpa, guarded, read_sdpa, zeroed
from sam3x.passes.attention.operators import TILED_ATTENTION
from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import SDPA
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.node_pass import NodePass


class TileAttentionPass(NodePass):
    """``aten.scaled_dot_product_attention`` → ``sam3x::tiled_attention`` wherever its scores are not known to fit the budget.

    Args:
        budget: bytes the scores of one attention may take.
    """

    name = "tile_attention"
    operators = (SDPA,)
    run_after = ("canonicalize_attention", "simplify_attention_masks", "fuse_multi_head_attention")

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def rewrite(self, emit: Emitter, node: Node) -> Node:
        found = read_sdpa(node)
        budget = self.budget_of(found)
        mask, hidden = guarded(emit, self.mask(emit, found))
        return zeroed(emit, emit(TILED_ATTENTION, found.query, found.key, found.value, mask, found.scale, budget), hidden)

    def budget_of(self, found: Sdpa) -> int:
        """What the scores of one attention may take.

        Raises:
            NoMatchError: it stays as it is.
        """
        size = score_bytes(found.query, found.key)
        if size <= self.budget:
            raise NoMatchError(f"its scores take at most {size:,.0f} bytes")
        return self.budget

    def mask(self, emit: Emitter, found: Sdpa) -> Node | None:
        """The mask in the form that the target's attention takes."""
        return found.mask


def score_bytes(query: Node, key: Node) -> float:
    """The bytes that the scores take, ∞ where a size is not fixed."""
    q, k = query.meta["val"], key.meta["val"]
    sizes = (*q.shape[:-1], k.shape[-2])
    return math.prod(sizes) * q.element_size() if all(isinstance(size, int) for size in sizes) else math.inf
