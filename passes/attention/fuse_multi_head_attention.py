"""Canonical attention as one operator over packed heads, (B, N, H·D), for targets that have such a kernel."""

from __future__ import annotations

import torch
from torch.fx import Node

from sam3x.passes.attention.guard import Sdpa, additive, guarded, is_finite, read_sdpa, zeroed
from sam3x.passes.attention.operators import MULTI_HEAD_ATTENTION
from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import SDPA, aten, dtype_of, same_size, shape_of
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.node_pass import NodePass


class FuseMultiHeadAttentionPass(NodePass):
    """``aten.scaled_dot_product_attention`` on (B, H, N, D) → ``sam3x::multi_head_attention`` on (B, N, H·D).

    Args:
        budget: bytes the scores of one attention may take, where a kernel does not keep them small by itself.
    """

    name = "fuse_multi_head_attention"
    operators = (SDPA,)
    run_after = ("canonicalize_attention", "simplify_attention_masks")

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def rewrite(self, emit: Emitter, node: Node) -> Node:
        found = read_sdpa(node)
        _check(found)
        heads, width = shape_of(found.query)[1], shape_of(found.value)[3]

        def packed(node: Node) -> Node:
            swapped = emit(aten.permute.default, node, [0, 2, 1, 3])
            return emit(aten.reshape.default, swapped, [emit.dim(node, 0), emit.dim(node, 2), heads * shape_of(node)[3]])

        operands = [packed(node) for node in (found.query, found.key, found.value)]
        mask = found.mask
        while mask is not None and len(shape_of(mask)) < 4:
            mask = emit(aten.unsqueeze.default, mask, 0)
        mask, hidden = guarded(emit, mask)
        key_mask, bias = _split(emit, mask, found)
        out = emit(MULTI_HEAD_ATTENTION, *operands, key_mask, bias, heads, found.scale, self.budget)
        if hidden is not None and same_size(shape_of(hidden)[1], 1):  # while heads are packed: the rows are one tensor
            out, hidden = zeroed(emit, out, emit(aten.squeeze.dims, hidden, [1])), None
        unpacked = emit(aten.reshape.default, out, [emit.dim(found.query, 0), emit.dim(found.query, 2), heads, width])
        output = emit(aten.permute.default, unpacked, [0, 2, 1, 3])
        return zeroed(emit, output, hidden)


def _check(found: Sdpa) -> None:
    q, k, v = (shape_of(node) for node in (found.query, found.key, found.value))
    if not len(q) == len(k) == len(v) == 4:
        raise NoMatchError("not (batch, heads, tokens, channels)")
    if not all(isinstance(size, int) for size in (q[1], q[3], v[3])):
        raise NoMatchError("the number of heads or channels is not fixed")
    if not all(same_size(a, b) for other in (k, v) for a, b in zip(q[:2], other[:2], strict=True)):
        raise NoMatchError("keys or values broadcast over batch or heads")
    if q[3] != v[3]:
        raise NoMatchError("the values are wider or narrower than the queries")
    mask = found.mask
    if mask is not None and dtype_of(mask) not in (torch.bool, dtype_of(found.query)) and not is_finite(mask):
        raise NoMatchError("its float mask may hide with numbers that only float32 has")


def _split(emit: Emitter, mask: Node | None, found: Sdpa) -> tuple[Node | None, Node | None]:
    """(bool (B, S): the keys to see, numbers (B or 1, H or 1, N, S) to add to the scores): one of them at most."""
    if mask is None:
        return None, None
    batch, _, queries, _ = shape_of(found.query)
    keys = shape_of(found.key)[2]
    shape = shape_of(mask)
    if mask.meta["val"].dtype is torch.bool and same_size(shape[1], 1) and same_size(shape[2], 1):
        key_mask = emit(aten.squeeze.dims, mask, [1, 2])
        if not (same_size(shape[0], batch) and same_size(shape[3], keys)):
            key_mask = emit(aten.expand.default, key_mask, [emit.dim(found.query, 0), emit.dim(found.key, 2)])
        return key_mask, None
    bias = additive(emit, mask, found.query)
    if not (same_size(shape[2], queries) and same_size(shape[3], keys)):
        bias = emit(aten.expand.default, bias, [-1, -1, emit.dim(found.query, 2), emit.dim(found.key, 2)])
    return None, bias
