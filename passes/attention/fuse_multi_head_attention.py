"""Canonical attention as one operator over packed heads, (B, N, H·D), for targets that have such a kernel."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sam3x.passes.attention.guard import Sdpa, additive, attentions, guarded, read_sdpa, replace, zeroed
from sam3x.passes.attention.operators import MULTI_HEAD_ATTENTION
from sam3x.passes.base import MatchFailure, Pass, PassResult
from sam3x.passes.graph.aten_nodes import same_size, shape_of
from sam3x.passes.graph.emitter import Emitter

_aten = torch.ops.aten


class FuseMultiHeadAttentionPass(Pass):
    """``aten.scaled_dot_product_attention`` on (B, H, N, D) → ``sam3x::multi_head_attention`` on (B, N, H·D).

    Args:
        budget: bytes the scores of one attention may take, where a kernel does not keep them small by itself.
    """

    name = "fuse_multi_head_attention"
    run_after = ("canonicalize_attention", "simplify_attention_masks")

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, failures = 0, []
        for module, node in attentions(program):
            found = read_sdpa(node)
            reason = found if isinstance(found, str) else _refusal(found)
            if isinstance(found, str) or reason is not None:
                failures.append(MatchFailure(node=node.name, reason=str(reason)))
                continue
            _rewrite(module, found, self.budget)
            rewrites += 1
        return PassResult(rewrites=rewrites, match_failures=tuple(failures))


def _refusal(found: Sdpa) -> str | None:
    q, k, v = (shape_of(node) for node in (found.query, found.key, found.value))
    if not len(q) == len(k) == len(v) == 4:
        return "not (batch, heads, tokens, channels)"
    if not all(isinstance(size, int) for size in (q[1], q[3], v[3])):
        return "the number of heads or channels is not fixed"
    if not all(same_size(a, b) for other in (k, v) for a, b in zip(q[:2], other[:2], strict=True)):
        return "keys or values broadcast over batch or heads"
    if q[3] != v[3]:
        return "the values are wider or narrower than the queries"
    return None


def _rewrite(module: GraphModule, found: Sdpa, budget: int) -> None:
    emit = Emitter(module, found.node)
    heads, width = shape_of(found.query)[1], shape_of(found.value)[3]

    def packed(node: Node) -> Node:
        swapped = emit(_aten.permute.default, node, [0, 2, 1, 3])
        return emit(_aten.reshape.default, swapped, [_size(emit, node, 0), _size(emit, node, 2), heads * shape_of(node)[3]])

    operands = [packed(node) for node in (found.query, found.key, found.value)]
    mask = found.mask
    while mask is not None and len(shape_of(mask)) < 4:
        mask = emit(_aten.unsqueeze.default, mask, 0)
    mask, hidden = guarded(emit, mask)
    key_mask, bias = _split(emit, mask, found)
    out = emit(MULTI_HEAD_ATTENTION, *operands, key_mask, bias, heads, found.scale, budget)
    if hidden is not None and same_size(shape_of(hidden)[1], 1):  # while heads are packed: the rows are one tensor
        out, hidden = zeroed(emit, out, emit(_aten.squeeze.dims, hidden, [1])), None
    unpacked = emit(_aten.reshape.default, out, [_size(emit, found.query, 0), _size(emit, found.query, 2), heads, width])
    output = emit(_aten.permute.default, unpacked, [0, 2, 1, 3])
    replace(module, found.node, zeroed(emit, output, hidden))


def _size(emit: Emitter, node: Node, dim: int) -> int | Node:
    value = shape_of(node)[dim]
    return emit(_aten.sym_size.int, node, dim) if isinstance(value, torch.SymInt) else value


def _split(emit: Emitter, mask: Node | None, found: Sdpa) -> tuple[Node | None, Node | None]:
    """(bool (B, S): the keys to see, numbers (B or 1, H or 1, N, S) to add to the scores): one of them at most."""
    if mask is None:
        return None, None
    batch, _, queries, _ = shape_of(found.query)
    keys = shape_of(found.key)[2]
    shape = shape_of(mask)
    if mask.meta["val"].dtype is torch.bool and same_size(shape[1], 1) and same_size(shape[2], 1):
        key_mask = emit(_aten.squeeze.dims, mask, [1, 2])
        if not (same_size(shape[0], batch) and same_size(shape[3], keys)):
            key_mask = emit(_aten.expand.default, key_mask, [_size(emit, found.query, 0), _size(emit, found.key, 2)])
        return key_mask, None
    bias = additive(emit, mask, found.query)
    if not (same_size(shape[2], queries) and same_size(shape[3], keys)):
        bias = emit(_aten.expand.default, bias, [-1, -1, _size(emit, found.query, 2), _size(emit, found.key, 2)])
    return None, bias
