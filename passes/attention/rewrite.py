"""Emit canonical attention: one plain ``aten.scaled_dot_product_attention`` on (L, N, D), (L, S, D), (L, S, E)."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from sam3x.passes.attention.layout import arrange
from sam3x.passes.attention.mask import HALF, combine_masks
from sam3x.passes.graph.aten_nodes import (
    CASTS,
    NOOPS,
    PERMUTES,
    RESHAPES,
    SDPA,
    VIEWS,
    aten,
    dtype_of,
    same_shape,
    same_size,
    shape_of,
)
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.form import Attention, Axis, Layout, NotAttentionError
from sam3x.passes.graph.known_numbers import Constant, number_factor


def rewrite(emit: Emitter, found: Attention, constant: Constant) -> Node:
    """Emit ``found`` as canonical attention and return the node that replaces its output.

    Raises:
        NotAttentionError: when a size cannot be named; nothing of it is left in the graph.
    """
    try:
        return _rewrite(emit, found, constant)
    except NotAttentionError:
        emit.undo()
        raise


def _rewrite(emit: Emitter, found: Attention, constant: Constant) -> Node:
    lead = _lead(found)
    q, on_q = _unscaled(emit, found.query[0], constant)
    k, on_k = _unscaled(emit, found.key[0], constant)
    scale = found.scale * on_q * on_k
    q = arrange(emit, q, found.query[1], (*lead, found.queries, found.channels), full=True)
    k = arrange(emit, k, found.key[1], (*lead, found.keys, found.channels), full=True)
    v = arrange(emit, found.value[0], found.value[1], (*lead, found.keys, found.value_channels), full=True)
    dtype = torch.promote_types(torch.promote_types(dtype_of(q), dtype_of(k)), dtype_of(v))
    fills = {step.fill for step, _ in found.masks} - {-math.inf}
    if dtype in HALF and len(fills) > 1:
        dtype = torch.float32  # a finite fill plus a float mask, and the distance of two fills, may not fit a half type
    mask, rows = combine_masks(emit, found.masks, (*lead, found.queries, found.keys), dtype)
    q, k, v = (emit.cast(node, dtype) for node in (q, k, v))
    if rows is not None:  # scores of zero, from the shorter side where a row is one for all queries
        zero = emit(aten.full.default, [], 0.0, dtype=dtype, device=q.meta["val"].device)
        if same_size(shape_of(rows)[-2], 1):
            k = emit(aten.where.self, rows, k, zero)
        else:
            q = emit(aten.where.self, rows, q, zero)
    output, layout = found.output
    result = attend(emit, q, k, v, mask, scale)
    result = emit.cast(result, dtype_of(output))
    return _finish(emit, result, output, (*lead, found.queries, found.value_channels), layout)


def _unscaled(emit: Emitter, node: Node, constant: Constant) -> tuple[Node, float]:
    """(x, c) with node = c·x: constant factors found under reshapes, permutes and casts are taken out."""
    factor, kept = 1.0, 0
    moves: list[Node] = []
    below: Any = node
    source: Any = node
    while below.op == "call_function":
        scaled = number_factor(below, constant)
        if scaled is not None and math.isfinite(scaled[1]):
            below, factor = scaled[0], factor * scaled[1]
            source, kept = below, len(moves)
        elif below.target in RESHAPES | PERMUTES | NOOPS or (below.target in CASTS and dtype_of(below).is_floating_point):
            moves.append(below)
            below = below.args[0]
        else:
            break
    for move in reversed(moves[:kept]):
        source = emit(move.target, source, *move.args[1:], **move.kwargs)
    return source, factor


def _lead(found: Attention) -> Layout:
    """Two groups of leading axes: batch and heads, as joined further up in the query where they come as one."""
    axes = tuple(itertools.chain(*found.lead))
    if len(found.lead) == 2:
        return found.lead
    if not axes:
        return ((), ())
    source: Any = found.query[0]
    while source.op == "call_function" and source.target in VIEWS | NOOPS:
        source = source.args[0]
        batch, heads = shape_of(source)[:2] if len(shape_of(source)) == 4 else (1, 1)
        if not same_size(batch, 1) and not same_size(heads, 1) and same_size(batch * heads, axes[0].size):
            axes[0].parts = (Axis(batch), Axis(heads))
            return tuple((part,) for part in axes[0].parts)
    return ((), axes)


def attend(emit: Emitter, q: Node, k: Node, v: Node, mask: Node | None, scale: float) -> Node:
    """The one plain node; kernels take the maximum before the scale, so only a positive scale goes there."""
    if not scale > 0:
        q, scale = emit(aten.mul.Tensor, q, scale), 1.0
    operands = (q, k, v, mask, 0.0, False)
    try:
        return emit(SDPA, *operands, scale=float(scale))
    except GuardOnDataDependentSymNode:  # torch asks whether a size that only a run tells is 1, to broadcast the mask
        shape = (*q.meta["val"].shape[:-1], v.meta["val"].shape[-1])
        return emit.shaped(q, shape, SDPA, *operands, scale=float(scale))


def _finish(emit: Emitter, result: Node, output: Node, have: Layout, wanted: Layout) -> Node:
    """``result`` in the layout of the product it replaces, laid out in memory as that was where a view follows."""
    if _viewed(output):
        result = emit(aten.clone.default, result, memory_format=torch.contiguous_format)
    final = arrange(emit, result, have, wanted, full=True)
    if not same_shape(shape_of(final), shape_of(output)):
        final = emit.reshape(final, shape_of(output))
    if final is not result and final.target is aten.view.default:
        for user in [user for user in output.users if user.target in VIEWS]:
            returned = any(item.op == "output" for item in user.users)  # its name stands in the signature
            if not returned and same_shape(shape_of(user), shape_of(result)) and final.args[0] is result:
                user.replace_all_uses_with(result)
    return final


def release_shapes(module: GraphModule, dying: Sequence[Node]) -> None:
    """Give what only reads the sizes of ``dying`` nodes another source, so that they can go."""
    for node in dying:
        for user in list(node.users):
            emit = Emitter(module, user, dying)
            with contextlib.suppress(NotAttentionError):
                if user.target is aten.sym_size.int:
                    user.replace_all_uses_with(emit.size(user.meta["val"]))
                elif user.target is aten.full_like.default and not set(user.users) <= set(dying):
                    like = user.meta["val"]
                    sizes = emit.sizes(shape_of(user))
                    new = emit(aten.full.default, sizes, user.args[1], dtype=like.dtype, device=like.device)
                    user.replace_all_uses_with(new)


def _viewed(node: Node) -> bool:
    """Whether a view depends on the memory layout of ``node``, directly or through permutes."""
    return any(
        user.target in VIEWS or (user.target in PERMUTES | {aten.alias.default, aten.detach.default} and _viewed(user))
        for user in node.users
    )


def explicit_causal(emit: Emitter, queries: Any, keys: Any, device: torch.device) -> Node:
    """(N, S) bool, True where key ≤ query: what ``is_causal`` means to torch, for any N and S."""
    rows = emit(aten.arange.default, emit.size(queries), device=device, pin_memory=False)
    columns = emit(aten.arange.default, emit.size(keys), device=device, pin_memory=False)
    return emit(aten.le.Tensor, columns, emit(aten.unsqueeze.default, rows, -1))


def repeat_heads(emit: Emitter, node: Node, heads: int) -> Node:
    """(…, G, S, D) to (…, heads, S, D): each head repeated heads/G times in a row."""
    *outer, groups, length, width = shape_of(node)
    if same_size(groups, heads):
        return node
    node = emit(aten.unsqueeze.default, node, -3)
    node = emit(aten.expand.default, node, emit.sizes([*outer, groups, heads // operator.index(groups), length, width]))
    shape = [*outer, heads, length, width]
    return emit.shaped(node, shape, aten.reshape.default, node, emit.sizes(shape))
