"""Rows written into a tensor, as the rows before them, themselves and the rows after them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from sam3x.capture.program import erase_dead
from sam3x.passes.base import MatchFailure, Pass, PassResult, graph_modules
from sam3x.passes.graph.aten_nodes import aten, dtype_of, same_shape, shape_of
from sam3x.passes.graph.cond_graph import expression
from sam3x.passes.graph.emitter import Emitter

_END = torch.iinfo(torch.int64).max


class DecomposeSliceScatterPass(Pass):
    """``aten.slice_scatter`` with step 1 → ``aten.cat``, and ``aten.copy`` over a whole tensor → what is copied.

    So upstream's geometry encoder fills one sequence with two (sam3/model/geometry_encoders.py, ``concat_padded_sequences``).
    Torch-TensorRT takes ``slice_scatter`` only where its ends are numbers.
    """

    name = "decompose_slice_scatter"

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, failures = 0, []
        for prefix, module in graph_modules(program):
            done = 0
            for node in list(module.graph.nodes):
                if node.target is aten.copy.default:
                    new: Node | str = _copied(node)
                elif node.target is aten.slice_scatter.default:
                    new = _joined(Emitter(module, node), node)
                else:
                    continue
                if isinstance(new, str):
                    failures.append(MatchFailure(node=f"{prefix}.{node.name}" if prefix else node.name, reason=new))
                    continue
                if not prefix:
                    program.graph_signature.replace_all_uses(node.name, new.name)
                node.replace_all_uses_with(new)
                done += 1
            if done:
                erase_dead(module)
            rewrites += done
        return PassResult(rewrites=rewrites, match_failures=tuple(failures))


def _copied(node: Node) -> Node | str:
    over, source = cast("tuple[Node, Node]", node.args[:2])
    if not same_shape(shape_of(over), shape_of(source)) or dtype_of(over) is not dtype_of(source):
        return "it converts or repeats what it copies"
    return source


def _joined(emit: Emitter, node: Node) -> Node | str:
    given = dict(zip(("input", "src", "dim", "start", "end", "step"), node.args, strict=False)) | dict(node.kwargs)
    base, source = cast(Node, given["input"]), cast(Node, given["src"])
    rank = len(shape_of(base))
    dim, start, end = given.get("dim", 0) % rank, given.get("start") or 0, given.get("end")
    end = _END if end is None else end
    if given.get("step", 1) != 1:
        return "it leaves rows out"
    if any(isinstance(at, int) and at < 0 for at in (start, end)):
        return "it counts rows from the end"
    size = expression(shape_of(base)[dim])
    low, high = (expression(at.meta["val"] if isinstance(at, Node) else at) for at in (start, end))
    rows = expression(shape_of(source)[dim])
    after = size - low - rows
    if (high != _END or after != 0) and high - low != rows:
        return "its rows are not as many as it writes"
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
