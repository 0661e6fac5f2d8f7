"""What a chain of views does to a tensor: which element of the source stands where, exactly and for every size.

Each dimension of a view is a mixed radix number: an ordered list of digits (``Digit``), each a stretch of one dimension of the
source. ``reshape`` regroups the digits and splits them, ``permute`` reorders, ``select`` and ``split`` fix or narrow one.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
from torch.fx import Node

from sam3x.passes.graph.aten_nodes import (
    NOOPS,
    PERMUTES,
    SHAPING,
    argument,
    aten,
    expression,
    permutation,
    shape_of,
    slice_args,
)

_SAME = NOOPS | {aten.lift_fresh_copy.default}
_RESHAPES = SHAPING | {aten.flatten.using_ints, aten.unflatten.int}
_SPLITS = {aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int, aten.chunk.default}
_PARTS = {operator.getitem, aten.select.int, aten.slice.Tensor}
_VIEWS = _SAME | _RESHAPES | PERMUTES | {aten.expand.default, aten.select.int, aten.slice.Tensor}


@dataclass(frozen=True, slots=True)
class Digit:
    """``size`` places in steps of ``stride`` along dimension ``dim`` of the source; ``dim`` −1: the same element every time."""

    dim: int
    size: sympy.Expr
    stride: sympy.Expr


@dataclass(frozen=True, slots=True)
class Layout:
    """A view of ``source``. ``offsets``: dimension of the source → where its stretch begins, 0 when not named."""

    source: Node
    dims: tuple[tuple[Digit, ...], ...]
    offsets: dict[int, sympy.Expr] = field(default_factory=dict)

    def whole(self, dim: int) -> tuple[Digit, ...]:
        """The digits of an untouched dimension of the source."""
        size = expression(self.source.meta["val"].shape[dim])
        return () if size == 1 else (Digit(dim, size, sympy.S.One),)

    @property
    def same(self) -> bool:
        """Whether the view is the source itself."""
        rank = self.source.meta["val"].dim()
        return not any(self.offsets.values()) and self.dims == tuple(self.whole(dim) for dim in range(rank))


def layout_of(node: Node, *, whole: bool = False) -> Layout:
    """The view that ``node`` is, of the first tensor on its way that is no view this module understands.

    Args:
        whole: follow only views of everything there is: a slice, a selection or a part of a split is a source.
    """
    chain: list[Node] = []
    source = node
    while (before := _viewed(source)) is not None and not (whole and source.target in _PARTS):
        chain.append(source)
        source = before
    while True:
        layout: Layout | None = _plain(source)
        for step in reversed(chain):
            layout = _step(layout, step)
            if layout is None:  # start over behind the step that is no plain view
                cut = chain.index(step)
                source, chain = step, chain[:cut]
                break
        else:
            assert layout is not None
            return layout


def _plain(source: Node) -> Layout:
    blank = Layout(source, ())
    return Layout(source, tuple(blank.whole(dim) for dim in range(source.meta["val"].dim())))


def _viewed(node: Node) -> Node | None:
    source: Any = node.args[0] if node.op == "call_function" and node.args else None
    if node.target is operator.getitem:
        return source.args[0] if getattr(source, "target", None) in _SPLITS else None
    return source if node.target in _VIEWS and isinstance(source, Node) else None


def _step(layout: Layout, node: Node) -> Layout | None:
    dims = layout.dims
    if node.target in _SAME:
        return layout
    if node.target in _RESHAPES:
        regrouped = _regroup(dims, [expression(size) for size in shape_of(node)])
        return None if regrouped is None else replace(layout, dims=regrouped)
    if (order := permutation(node)) is not None:
        return replace(layout, dims=tuple(dims[d] for d in order))
    if node.target is aten.expand.default:
        shape = [expression(size) for size in shape_of(node)]
        pairs = zip((*((),) * (len(shape) - len(dims)), *dims), shape, strict=True)
        repeated = [digits if _size(digits) == size else (Digit(-1, size, sympy.S.Zero),) for digits, size in pairs]
        return replace(layout, dims=tuple(repeated))
    return _narrow(layout, node)


def _narrow(layout: Layout, node: Node) -> Layout | None:
    """``select``, ``slice`` and parts of a split: one digit fixed or shortened."""
    dims, rank = layout.dims, len(layout.dims)
    if node.target is operator.getitem:
        split, index = node.args
        parts = split.meta["val"]
        if split.target is aten.unbind.int:
            at, start, length = argument(split, 1, "dim", 0) % rank, sympy.sympify(index), None
        else:
            at = argument(split, 2, "dim", 0) % rank
            start = sum((expression(part.shape[at]) for part in parts[:index]), sympy.S.Zero)
            length = expression(parts[index].shape[at])
    elif node.target is aten.select.int:
        at, start, length = node.args[1] % rank, node.args[2], None
        if not isinstance(start, int):
            return None
        start = sympy.sympify(start) + (_size(dims[at]) if start < 0 else 0)
    else:
        _, at, start, _, step = slice_args(node)
        at %= rank
        length = expression(node.meta["val"].shape[at])
        if not isinstance(start or 0, int) or (start or 0) < 0 or step != 1:
            return None
        start = sympy.sympify(start or 0)
    digits = dims[at]
    if length is not None and start == 0 and length == _size(digits):
        return layout
    if length == 0 or len(digits) > 1 or (digits and digits[0].dim < 0):
        return None
    if not digits and (start != 0 or length is not None):
        return None
    new: tuple[Digit, ...] = ()
    offsets = dict(layout.offsets)
    if digits:
        digit = digits[0]
        offsets[digit.dim] = sympy.expand(offsets.get(digit.dim, sympy.S.Zero) + start * digit.stride)
        new = () if length is None or length == 1 else (replace(digit, size=length),)
    rest = (*dims[:at], *dims[at + 1 :]) if length is None else (*dims[:at], new, *dims[at + 1 :])
    return replace(layout, dims=rest, offsets=offsets)


def _size(digits: tuple[Digit, ...]) -> sympy.Expr:
    return sympy.Mul(*(digit.size for digit in digits)) if digits else sympy.S.One


def _regroup(dims: tuple[tuple[Digit, ...], ...], shape: list[sympy.Expr]) -> tuple[tuple[Digit, ...], ...] | None:
    """The same digits in order, cut where the new dimensions end; None where a cut falls inside a size that is not known."""
    left = [digit for digits in dims for digit in digits][::-1]
    new: list[tuple[Digit, ...]] = []
    for size in shape:
        taken: list[Digit] = []
        while size != 1:
            if not left:
                return None
            digit = left.pop()
            over, under = sympy.cancel(size / digit.size), sympy.cancel(digit.size / size)
            if sympy.denom(over) == 1:
                size = over
            elif sympy.denom(under) == 1:
                left.append(replace(digit, size=under))
                digit, size = replace(digit, size=size, stride=digit.stride * under), sympy.S.One
            else:
                return None
            taken.append(digit)
        new.append(_merged(taken))
    return None if left else tuple(new)


def _merged(digits: list[Digit]) -> tuple[Digit, ...]:
    result: list[Digit] = []
    for digit in digits:
        last = result[-1] if result else None
        if last is not None and last.dim == digit.dim and sympy.expand(last.stride - digit.stride * digit.size) == 0:
            result[-1] = replace(digit, size=last.size * digit.size)
        else:
            result.append(digit)
    return tuple(result)
