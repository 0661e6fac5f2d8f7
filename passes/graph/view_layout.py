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

from sam3x.passes.graph.cond_graph import aten, expression, slice_args

_SAME = {aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default, aten.lift_fresh_copy.default}
_RESHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints}
_RESHAPES |= {aten.unflatten.int}
_SPLITS = {aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int, aten.chunk.default}


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


_PARTS = {operator.getitem, aten.select.int, aten.slice.Tensor}


def _plain(source: Node) -> Layout:
    blank = Layout(source, ())
    return Layout(source, tuple(blank.whole(dim) for dim in range(source.meta["val"].dim())))


def _viewed(node: Node) -> Node | None:
    if node.op != "call_function":
        return None
    target: Any = node.target
    if target is operator.getitem and isinstance(node.args[0], Node) and node.args[0].target in _SPLITS:
        return node.args[0].args[0]  # type: ignore[return-value]
    views = {aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.dims}
    views |= {aten.squeeze.dim, aten.expand.default, aten.select.int, aten.slice.Tensor}
    known = target in _SAME or target in _RESHAPES or target in views
    return node.args[0] if known and isinstance(node.args[0], Node) else None


def _step(layout: Layout, node: Node) -> Layout | None:
    target: Any = node.target
    dims, rank = layout.dims, len(layout.dims)
    if target in _SAME:
        return layout
    if target in _RESHAPES:
        regrouped = _regroup(dims, [expression(size) for size in node.meta["val"].shape])
        return None if regrouped is None else replace(layout, dims=regrouped)
    if target is aten.permute.default:
        return replace(layout, dims=tuple(dims[d % rank] for d in node.args[1]))
    if target in (aten.transpose.int, aten.t.default):
        a, b = (d % rank for d in (node.args[1:3] if target is aten.transpose.int else (0, 1)))
        order = list(range(rank))
        order[a], order[b] = b, a  # type: ignore[assignment]
        return replace(layout, dims=tuple(dims[d] for d in order))
    if target is aten.unsqueeze.default:
        at = node.args[1] % (rank + 1)
        return replace(layout, dims=(*dims[:at], (), *dims[at:]))
    if target in (aten.squeeze.dim, aten.squeeze.dims):
        given = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
        gone = {d % rank for d in given}
        if any(dims[d] for d in gone):
            return None
        return replace(layout, dims=tuple(digits for d, digits in enumerate(dims) if d not in gone))
    if target is aten.expand.default:
        shape = [expression(size) for size in node.meta["val"].shape]
        given = ((),) * (len(shape) - rank) + dims
        source = [sympy.S.One] * (len(shape) - rank) + [_size(digits) for digits in dims]
        new = [
            digits if before == size else (Digit(-1, size, sympy.S.Zero),)
            for digits, before, size in zip(given, source, shape, strict=True)
        ]
        return replace(layout, dims=tuple(new))
    return _narrow(layout, node)


def _narrow(layout: Layout, node: Node) -> Layout | None:
    """``select``, ``slice`` and parts of a split: one digit fixed or shortened."""
    dims, rank = layout.dims, len(layout.dims)
    if node.target is operator.getitem:
        split, index = node.args
        parts = split.meta["val"]
        given = split.args[2] if split.target is not aten.unbind.int and len(split.args) > 2 else 0
        given = split.args[1] if split.target is aten.unbind.int and len(split.args) > 1 else given
        at = given % rank
        if split.target is aten.unbind.int:
            start, length = sympy.sympify(index), None
        else:
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
