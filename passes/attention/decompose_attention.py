"""Canonical attention to plain matmul, softmax, matmul, with torch's answer for rows whose keys are all masked."""

from __future__ import annotations

import torch
from torch.fx import Node

from sam3x.passes.attention.guard import additive, guarded, read_sdpa, zeroed
from sam3x.passes.graph.aten_nodes import SDPA, aten, dtype_of
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.node_pass import NodePass


class DecomposeAttentionPass(NodePass):
    """``aten.scaled_dot_product_attention`` → arithmetic that every target has, in the dtype of the query.

    Args:
        float32_softmax: add masks and normalize in float32, whatever the products are in.
    """

    name = "decompose_attention"
    operators = (SDPA,)
    run_after = ("canonicalize_attention", "simplify_attention_masks", "tile_attention", "fuse_multi_head_attention")

    def __init__(self, *, float32_softmax: bool = False) -> None:
        self.float32_softmax = float32_softmax

    def rewrite(self, emit: Emitter, node: Node) -> Node:
        found = read_sdpa(node)
        rank = found.key.meta["val"].dim()
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        scaled = emit(aten.mul.Tensor, found.query, found.scale)
        # torch compares the sizes of what it broadcasts: not possible for rows that only a run counts, as u and as u²/u
        lead = found.query.meta["val"].shape[:-1]
        keys, channels = found.key.meta["val"].shape[-2], found.value.meta["val"].shape[-1]
        turned = emit(aten.permute.default, found.key, swapped)
        scores = emit.shaped(found.query, (*lead, keys), aten.matmul.default, scaled, turned)
        mask, hidden = guarded(emit, found.mask)
        if self.float32_softmax:
            scores = emit.cast(scores, torch.float32)
        if mask is not None:
            scores = emit.shaped(scores, (*lead, keys), aten.add.Tensor, scores, additive(emit, mask, scores))
        weights = emit.cast(emit(aten._softmax.default, scores, -1, False), dtype_of(found.query))
        output = emit.shaped(found.query, (*lead, channels), aten.matmul.default, weights, found.value)
        return zeroed(emit, output, hidden)
