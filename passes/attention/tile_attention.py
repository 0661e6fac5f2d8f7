"""Attention that may need more memory than it is allowed, marked to be computed a tile of queries at a time."""

from __future__ import annotations

import math

from torch.export import ExportedProgram
from torch.fx import Node

from sam3x.passes.attention.guard import Sdpa, attentions, guarded, read_sdpa, replace, zeroed
from sam3x.passes.attention.operators import TILED_ATTENTION
from sam3x.passes.base import MatchFailure, Pass, PassResult
from sam3x.passes.graph.emitter import Emitter


class TileAttentionPass(Pass):
    """``aten.scaled_dot_product_attention`` → ``sam3x::tiled_attention`` wherever its scores are not known to fit the budget.

    Args:
        budget: bytes the scores of one attention may take.
    """

    name = "tile_attention"
    run_after = ("canonicalize_attention", "simplify_attention_masks", "fuse_multi_head_attention")

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, failures = 0, []
        for module, node in attentions(program):
            found = read_sdpa(node)
            budget = found if isinstance(found, str) else self.budget_of(found)
            if isinstance(found, str) or isinstance(budget, str):
                failures.append(MatchFailure(node=node.name, reason=str(budget)))
                continue
            emit = Emitter(module, node)
            mask, hidden = guarded(emit, self.mask(emit, found))
            tiled = emit(TILED_ATTENTION, found.query, found.key, found.value, mask, found.scale, budget)
            replace(module, node, zeroed(emit, tiled, hidden))
            rewrites += 1
        return PassResult(rewrites=rewrites, match_failures=tuple(failures))

    def budget_of(self, found: Sdpa) -> int | str:
        """What the scores of one attention may take, or why it stays as it is."""
        size = score_bytes(found.query, found.key)
        return f"its scores take at most {size:,.0f} bytes" if size <= self.budget else self.budget

    def mask(self, emit: Emitter, found: Sdpa) -> Node | None:
        """The mask in the form that the target's attention takes."""
        return found.mask


def score_bytes(query: Node, key: Node) -> float:
    """The bytes that the scores take, ∞ where a size is not fixed."""
    q, k = query.meta["val"], key.meta["val"]
    sizes = (*q.shape[:-1], k.shape[-2])
    return math.prod(sizes) * q.element_size() if all(isinstance(size, int) for size in sizes) else math.inf
