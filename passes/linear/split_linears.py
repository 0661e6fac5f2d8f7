"""Projections made together and read apart (packed q, k, v; pairs of a rotary embedding), each a linear of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import Node

from sam3x.capture.program import erase_dead
from sam3x.passes.base import MatchFailure, NoMatchError, Pass, PassResult
from sam3x.passes.graph.aten_nodes import aten
from sam3x.passes.graph.constants import Constants
from sam3x.passes.graph.emitter import Emitter, fake_mode_of
from sam3x.passes.graph.view_layout import Digit, layout_of

SMALLEST = 256
"""Rows of a weight worth a product of their own; below, a small product costs more than the copy it saves."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What one reader takes of ``linear``: ``rows`` of its weight, then ``dims``, the digits of each dimension of ``view``.

    Digits of the last dimension of the linear count ``rows`` in their order there.
    """

    view: Node
    rows: tuple[int, ...]
    dims: tuple[tuple[Digit, ...], ...]


class SplitLinearsPass(Pass):
    """``linear`` whose readers each take other features → a linear with those rows of the weight for each reader.

    A runtime copies parts out of a product, and once more where heads are transposed before they are parted; where every second
    feature is taken, as in a rotary embedding, number by number.

    Args:
        smallest: features a part must have.
    """

    name = "split_linears"
    run_after = ("canonicalize_attention", "decompose_complex")

    def __init__(self, smallest: int = SMALLEST) -> None:
        self.smallest = smallest

    def call(self, program: ExportedProgram) -> PassResult:
        module, rewrites, failures = program.graph_module, 0, []
        constants = Constants(program, fake_mode_of(module))
        for linear in module.graph.find_nodes(op="call_function", target=aten.linear.default):
            x, *operands = linear.args
            values = [constants.value(item) for item in operands if item is not None]
            views = _read_views(linear)
            if len(views) < 2:
                continue
            try:
                if any(value is None for value in values):
                    raise NoMatchError("its weight is no constant")
                parts = [_part(linear, view) for view in views]
                self._check(parts)
            except NoMatchError as reason:
                failures.append(MatchFailure(node=linear.name, reason=str(reason)))
                continue
            made: dict[tuple[int, ...], Node] = {}
            for part in parts:
                emit = Emitter(module, linear)
                if part.rows not in made:
                    weights = [_rows(constants, item, part.rows) for item in operands if item is not None]
                    made[part.rows] = emit(aten.linear.default, x, *weights)
                seen = _seen(emit, linear, made[part.rows], part)
                part.view.replace_all_uses_with(seen)
            rewrites += 1
        if rewrites:
            erase_dead(module)
            constants.drop_unused()
        return PassResult(rewrites=rewrites, match_failures=tuple(failures))

    def _check(self, parts: Sequence[_Part]) -> None:
        kinds = {part.rows for part in parts}
        if len(kinds) < 2:
            raise NoMatchError("all readers take the same features")
        if len({row for rows in kinds for row in rows}) < sum(len(rows) for rows in kinds):
            raise NoMatchError("readers share features")
        if min(len(rows) for rows in kinds) < self.smallest:
            raise NoMatchError(f"a part has fewer than {self.smallest} features")


def _read_views(linear: Node) -> list[Node]:
    """The views of ``linear`` that something other than a view reads, in order."""
    todo, found = [linear], []
    while todo:
        node = todo.pop()
        followed = [user for user in node.users if _is_tensor(user) and layout_of(user).source is linear]
        if len(followed) < len(node.users):
            found.append(node)
        todo += followed
    return found[::-1]


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _part(linear: Node, view: Node) -> _Part:
    layout, value = layout_of(view), linear.meta["val"]
    last = value.dim() - 1
    digits = [digit for dim in layout.dims for digit in dim]
    if any(digit.dim < 0 for digit in digits):
        raise NoMatchError("a reader repeats it")
    for dim in range(last):
        if tuple(digit for digit in digits if digit.dim == dim) != layout.whole(dim) or layout.offsets.get(dim, 0) != 0:
            raise NoMatchError("a reader cuts another dimension than the last")
    unknown = [dim for dim in layout.dims if not all(digit.size.is_Integer for digit in dim)]
    if len(unknown) > 1 and any(len(dim) > 1 for dim in unknown):
        raise NoMatchError("a reader joins dimensions of which several are dynamic")
    features = sorted((digit for digit in digits if digit.dim == last), key=lambda digit: -int(digit.stride))
    rows = np.array([int(layout.offsets.get(last, 0))])
    for digit in features:
        rows = (rows[:, None] + int(digit.stride) * np.arange(int(digit.size))).reshape(-1)
    return _Part(view, tuple(rows.tolist()), layout.dims)


def _rows(constants: Constants, node: Any, rows: tuple[int, ...]) -> Node:
    value = constants.value(node)
    assert value is not None
    together = rows == tuple(range(rows[0], rows[0] + len(rows)))
    part = value[rows[0] : rows[0] + len(rows)] if together else value[list(rows)]  # a stretch of rows needs no copy
    return constants.add(part, node.name.removeprefix("p_"))


def _seen(emit: Emitter, linear: Node, made: Node, part: _Part) -> Node:
    """``made`` (…, rows) laid out as ``part.view``."""
    value, x = linear.meta["val"], linear.args[0]
    last = value.dim() - 1
    own = [digit for digits in part.dims for digit in digits]
    order = sorted(range(len(own)), key=lambda at: (own[at].dim, -own[at].stride if own[at].dim == last else 0))
    sizes = [int(own[at].size) if own[at].dim == last else value.shape[own[at].dim] for at in order]

    def argument(size: Any, shape: Sequence[Any], digits: Sequence[Digit]) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        if sum(isinstance(other, torch.SymInt) for other in shape) == 1:
            return -1
        return emit(aten.sym_size.int, x, digits[0].dim)

    apart = [argument(size, sizes, [own[at]]) for size, at in zip(sizes, order, strict=True)]
    split = emit.shaped(made, sizes, aten.reshape.default, made, apart)
    moved = emit.permute(split, [order.index(at) for at in range(len(own))])
    shape = list(part.view.meta["val"].shape)
    joined = [argument(size, shape, digits) for size, digits in zip(shape, part.dims, strict=True)]
    return emit.shaped(made, shape, aten.reshape.default, moved, joined)
