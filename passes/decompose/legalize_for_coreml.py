"""Operators whose converters in coremltools leave out a case, as others whose converters do not."""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import Node

from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import aten, dtype_of, same_shape, same_size, shape_of
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.node_pass import NodePass

_LOGICAL = {
    getattr(aten, name).Tensor: getattr(aten, f"logical_{word}").default
    for word in ("and", "or", "xor")
    for name in (f"bitwise_{word}", f"__{word}__")
}


class LegalizeForCoreMlPass(NodePass):
    """``div`` with a rounding → ``floor_divide`` or ``trunc``; ``expand`` → ``repeat``; ``scatter`` of one row → ``where``;
    ``bitwise_or`` of bools → ``logical_or``; ``where`` of two that are smaller than the condition → of two as large.

    coremltools 9 takes the rounding for a tensor. Of what it expands to a size that a run decides it knows no other size. It
    scatters nothing whose sizes it does not know to be those of the indices. The shape of a ``where`` it takes from its values.
    """

    name = "legalize_for_coreml"
    operators = (aten.div.Tensor_mode, aten.expand.default, aten.scatter.src, aten.where.self, *_LOGICAL)

    def rewrite(self, emit: Emitter, node: Node) -> Node | None:
        if node.target in _LOGICAL:
            return _logical(emit, node)
        if node.target is aten.expand.default:
            return _repeated(emit, node)
        if node.target is aten.scatter.src:
            return _chosen(emit, node)
        if node.target is aten.where.self:
            return _as_large(emit, node)
        mode = node.kwargs["rounding_mode"]
        if mode == "floor":
            return emit(aten.floor_divide.default, *node.args)
        whole = emit(aten.div.Tensor, *node.args)
        return whole if mode is None else emit(aten.trunc.default, whole)


def _logical(emit: Emitter, node: Node) -> Node:
    if dtype_of(node) is not torch.bool:
        raise NoMatchError("its bits are those of whole numbers")
    return emit(_LOGICAL[node.target], *node.args)  # type: ignore[index]


def _repeated(emit: Emitter, node: Node) -> Node:
    source, sizes = cast("tuple[Node, list[int | Node]]", node.args)
    had, now = shape_of(source), shape_of(node)
    new = len(now) - len(had)
    for _ in range(new):
        source = emit(aten.unsqueeze.default, source, 0)
    if same_shape([1] * new + had, now):
        return source
    pairs = zip(sizes, [1] * new + had, now, strict=True)
    times = [1 if same_size(before, after) else size for size, before, after in pairs]
    return emit.shaped(node, now, aten.repeat.default, source, times)


def _chosen(emit: Emitter, node: Node) -> Node:
    base, dim, index, source = cast("tuple[Node, int, Node, Node]", node.args)
    sizes, given = shape_of(base), shape_of(index)
    dim %= len(sizes)
    row = [*sizes[:dim], 1, *sizes[dim + 1 :]]
    if not same_shape(given, row) or not same_shape(shape_of(source), row):
        raise NoMatchError("it scatters more than one row, or a part of one")
    device = base.meta["val"].device
    places = emit(aten.arange.start_step, 0, emit.dim(base, dim), 1, dtype=torch.int64, device=device, pin_memory=False)
    places = emit(aten.reshape.default, places, [-1, *[1] * (len(sizes) - dim - 1)])
    return emit(aten.where.self, emit(aten.eq.Tensor, index, places), source, base)


def _as_large(emit: Emitter, node: Node) -> Node | None:
    condition, first, second = cast("tuple[Node, Node, Node]", node.args)
    sizes = shape_of(node)
    given = [shape_of(value)[::-1] for value in (first, second)]
    if all(any(len(had) > dim and same_size(had[dim], size) for had in given) for dim, size in enumerate(sizes[::-1])):
        return None
    dtype = dtype_of(node)
    if dtype is torch.bool:
        nothing = emit(aten.logical_and.default, condition, emit(aten.logical_not.default, condition))
        first = emit(aten.logical_or.default, first, nothing)
    else:
        nothing = emit(aten.mul.Tensor, emit.cast(condition, dtype), 0)
        first = emit(aten.add.Tensor, first, nothing)
    return emit.shaped(node, sizes, aten.where.self, condition, first, second)
