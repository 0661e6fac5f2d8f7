"""Sets of ATen operators that do alike, and what a node's tensor is, asked without adding guards."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sam3x.passes.graph.cond_graph import divided, expression

aten = torch.ops.aten

CASTS = {aten._to_copy.default, aten.to.dtype}
NOOPS = {aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default}
RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
}
VIEWS = {aten.view.default, aten._unsafe_view.default}
PERMUTES = {aten.permute.default, aten.transpose.int}
SDPA = aten.scaled_dot_product_attention.default


def shape_of(node: Node) -> list[Any]:
    """Sizes of a tensor node, symbolic ones as SymInt."""
    return list(node.meta["val"].shape)


def dtype_of(node: Node) -> torch.dtype:
    """Element type of a tensor node."""
    return node.meta["val"].dtype


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every value of the symbols; adds no guard."""
    if a is b or statically_known_true(a == b):
        return True
    if isinstance(a, int) and isinstance(b, int):
        return False
    return divided(expression(a)) == divided(expression(b))  # torch leaves n² // n, which a reshape to -1 makes


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal for every value of the symbols."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def permutation(node: Node) -> list[int] | None:
    """The order of dimensions of a permute or transpose node, None for another node."""
    if node.target not in PERMUTES or node.op != "call_function":
        return None
    rank = len(shape_of(node))
    if node.target is aten.permute.default:
        return [dim % rank for dim in node.args[1]]  # type: ignore[misc]
    order = list(range(rank))
    first, second = (operator.index(dim) % rank for dim in node.args[1:3])
    order[first], order[second] = order[second], order[first]
    return order
