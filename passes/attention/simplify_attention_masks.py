"""Masks of canonical attention without the copies a caller made of them: one for all heads, bool where they only hide."""

from __future__ import annotations

import itertools
import math
from typing import Any

from torch.fx import Node

from sam3x.passes.attention.guard import read_sdpa
from sam3x.passes.graph.aten_nodes import FILLS, SDPA, SHAPING, aten, permutation, same_size, shape_of
from sam3x.passes.graph.axes import Axis, Layout, axes_of, leaves, regrouped
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.node_pass import NodePass


class SimplifyAttentionMasksPass(NodePass):
    """Expanded dimensions of a mask back to size 1, and ``where(padding, -inf, 0)`` back to the bool it was made of.

    ``torch.nn.MultiheadAttention`` turns a (B, S) padding mask into numbers and copies it for every head.
    """

    name = "simplify_attention_masks"
    operators = (SDPA,)
    run_after = ("canonicalize_attention",)

    def rewrite(self, emit: Emitter, node: Node) -> Node | None:
        mask = read_sdpa(node).mask
        if mask is None or len(shape_of(mask)) != 4:
            return None
        source, own, layout = _followed(mask)
        kept = {axis for dim in own for axis in leaves(dim)}
        slim = tuple(tuple(axis for axis in leaves(dim) if axis in kept) for dim in layout)
        if list(itertools.chain(*slim)) != [axis for dim in own for axis in leaves(dim)]:
            return None
        if any(dim and dim != tuple(leaves(whole)) for dim, whole in zip(slim, layout, strict=True)):
            return None  # one dimension holds the batch and its copies: without them it would not broadcast
        new, padding = source, hiding(source)
        if padding is not None:
            if len(shape_of(padding[0])) != len(shape_of(source)):
                return None
            new = padding[0] if padding[1] else emit(aten.logical_not.default, padding[0])
        elif source is mask:
            return None
        shape = [math.prod(axis.size for axis in dim) for dim in slim]
        if not all(same_size(a, b) for a, b in itertools.zip_longest(shape_of(new), shape, fillvalue=-1)):
            new = emit(aten.reshape.default, new, emit.sizes(shape))
        if new is mask:
            return None
        node.replace_input_with(mask, new)
        return node


def _followed(mask: Node) -> tuple[Node, Layout, Layout]:
    """The tensor a mask is a rearranged copy of, that tensor's axes, and the mask's: those in it alone are copies."""
    chain: list[Node] = []
    source = mask
    while source.op == "call_function" and (
        source.target in SHAPING | {aten.expand.default, aten.clone.default} or permutation(source) is not None
    ):
        chain.append(source)
        source = source.args[0]  # type: ignore[assignment]
    own: Layout = tuple(axes_of(size) for size in shape_of(source))
    layout = own
    for node in reversed(chain):
        after = _moved(node, layout)
        if after is None:  # start again below what cannot be followed
            source = node
            own = after = tuple(axes_of(size) for size in shape_of(node))
        layout = after
    return source, own, layout


def _moved(node: Node, layout: Layout) -> Layout | None:
    order = permutation(node)
    if order is not None:
        return tuple(layout[dim] for dim in order)
    shape = shape_of(node)
    if node.target is aten.clone.default:
        return layout
    if node.target is aten.expand.default:
        layout = (*((),) * (len(shape) - len(layout)), *layout)
        return tuple(dim or (() if same_size(size, 1) else (Axis(size),)) for dim, size in zip(layout, shape, strict=True))
    return regrouped(layout, shape)


def hiding(node: Node) -> tuple[Node, bool] | None:
    """(m, visible) for ``where(m, -inf, 0)``, visible False, or ``where(m, 0, -inf)``, visible True."""
    if node.target is not aten.where.self:
        return None
    values = tuple(_filling(value) for value in node.args[1:])
    if values not in ((-math.inf, 0.0), (0.0, -math.inf)):
        return None
    return node.args[0], values[0] == 0.0  # type: ignore[return-value]


def _filling(node: Any) -> float | None:
    """The number that fills a tensor."""
    if not isinstance(node, Node):
        return None
    value = node.args[node.target is not aten.scalar_tensor.default] if node.target in FILLS else None
    return float(value) if isinstance(value, (int, float)) else None
