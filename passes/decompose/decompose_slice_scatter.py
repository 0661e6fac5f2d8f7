"""Rows written into a tensor, as the rows before them, themselves and the rows after them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import Node

from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import aten, dtype_of, expression, same_shape, shape_of
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.node_pass import NodePass

_END = torch.iinfo(torch.int64).max


class DecomposeSliceScatterPass(NodePass):
    """``aten.slice_scatter`` with step 1 → ``aten.cat``, and ``aten.copy`` over a whole tensor → what is copied.

    So upstream's geometry encoder fills one sequence with two (sam3/model/geometry_encoders.py, ``concat_padded_sequences``).
    Torch-TensorRT takes ``slice_scatter`` only where its ends are numbers.
    """

    name = "decompose_slice_scatter"
    operators = (aten.copy.default, aten.slice_scatter.default)

    def rewrite(self, emit: Emitter, node: Node) -> Node:
        if node.target is aten.slice_scatter.default:
            return _joined(emit, node)
        over, source = cast("tuple[Node, Node]", node.args[:2])
        if not same_shape(shape_of(over), shape_of(source)) or dtype_of(over) is not dtype_of(source):
            raise NoMatchError("it converts or repeats what it copies")
        return source


def _joined(emit: Emitter, node: Node) -> Node:
    given = dict(zip(("input", "src", "dim", "start", "end", "step"), node.args, strict=False)) | dict(node.kwargs)
    base, source = cast(Node, given["input"]), cast(Node, given["src"])
    rank = len(shape_of(base))
    dim, start, end = given.get("dim", 0) % rank, given.get("start") or 0, given.get("end")
    end = _END if end is None else end
    if given.get("step", 1) != 1:
        raise NoMatchError("it leaves rows out")
    if any(isinstance(at, int) and at < 0 for at in (start, end)):
        raise NoMatchError("it counts rows from the end")
    size = expression(shape_of(base)[dim])
    low, high = (expression(at.meta["val"] if isinstance(at, Node) else at) for at in (start, end))
    rows = expression(shape_of(source)[dim])
    after = size - low - rows
    if (high != _END or after != 0) and high - low != rows:
        raise NoMatchError("its rows are not as many as it writes")
    parts = [source]
    if low != 0:
        parts.insert(0, _part(emit, base, dim, 0, start, low))
    if after != 0:
        parts.append(_part(emit, base, dim, end, _END, after))
    return source if len(parts) == 1 else emit.shaped(node, shape_of(node), aten.cat.default, parts, dim)


def _part(emit: Emitter, base: Node, dim: int, start: Any, end: Any, rows: Any) -> Node:
    """``rows`` of ``base``; of a constant, a shorter one where their number is known."""
    if base.target is aten.full.default and rows.is_Integer:
        sizes = [int(rows) if axis == dim else size for axis, size in enumerate(base.args[0])]
        return emit(aten.full.default, sizes, *base.args[1:], **base.kwargs)
    return emit(aten.slice.Tensor, base, dim, start, end)
