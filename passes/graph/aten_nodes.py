"""Sets of ATen operators that do alike, and what a node's tensor is, asked without adding guards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import FloorDiv

aten = torch.ops.aten

CASTS = {aten._to_copy.default, aten.to.dtype}
NOOPS = {aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default}
VIEWS = {aten.view.default, aten._unsafe_view.default}
SHAPING = VIEWS | {aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims}
"""What only regroups dimensions."""
RESHAPES = SHAPING | {aten.expand.default}
PERMUTES = {aten.permute.default, aten.transpose.int, aten.t.default}
FILLS = {aten.full.default, aten.full_like.default, aten.scalar_tensor.default}
SOFTMAXES = {aten._softmax.default, aten.softmax.int, aten._safe_softmax.default}
SDPA = aten.scaled_dot_product_attention.default
HEAVY = {aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}
HEAVY |= {aten.convolution.default, SDPA}
"""What costs more than a conditional saves."""


def expression(size: Any) -> sympy.Expr:
    """A size as an expression in the graph's symbols."""
    return size.node.expr if isinstance(size, (torch.SymInt, torch.SymBool, torch.SymFloat)) else sympy.sympify(size)


def divided(size: sympy.Expr) -> sympy.Expr:
    """A size whose divisions without a rest are done: torch leaves ``n**2 // n``."""

    def quotient(base: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
        found = sympy.cancel(base / divisor)
        return found if sympy.denom(sympy.together(found)) == 1 else FloorDiv(base, divisor)

    return size.replace(FloorDiv, quotient) if size.has(FloorDiv) else size


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


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a node, wherever it was given."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def permutation(node: Node) -> list[int] | None:
    """The order of dimensions of a permute or transpose node, None for another node."""
    if node.target not in PERMUTES or node.op != "call_function":
        return None
    order = list(range(len(shape_of(node))))
    if node.target is aten.permute.default:
        return [order[dim] for dim in node.args[1]]
    first, second = node.args[1:3] if node.target is aten.transpose.int else (0, -1)
    order[first], order[second] = order[second], order[first]
    return order


def slice_args(node: Node) -> tuple[Any, int, Any, Any, Any]:
    """(tensor, dimension, start, end, step) of an ``aten.slice``."""
    defaults = {"self": None, "dim": 0, "start": None, "end": None, "step": 1}
    given = dict(zip(defaults, node.args, strict=False))
    return tuple({**defaults, **given, **node.kwargs}.values())  # type: ignore[return-value]
