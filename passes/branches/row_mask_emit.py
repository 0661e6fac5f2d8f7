"""What a mask of rows puts into the graph (``row_mask``): the mask, the keys it hides, the rows it picks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sam3x.passes.graph.cond_graph import Builder, aten, fake_mode_of


def chosen_rows(emit: Builder, predicate: Any, source: Node, size: Any, lengths: Sequence[Any]) -> Node:
    """(rows,) bool: whether a row is one of the chosen; ``lengths``: how many each branch takes, None for all."""
    if predicate.meta["val"].dim():
        predicate = emit(aten.reshape.default, predicate, [])
    device = source.meta["val"].device
    index = emit(aten.arange.start_step, 0, size, 1, dtype=torch.int64, device=device, pin_memory=False)
    true, false = (None if length is None else emit(aten.lt.Scalar, index, length) for length in lengths)
    if true is not None and false is not None:
        return emit(aten.where.self, predicate, true, false)
    if true is not None:
        return emit(aten.logical_or.default, true, emit(aten.logical_not.default, predicate))
    if false is not None:
        return emit(aten.logical_or.default, false, predicate)
    return emit(aten.ge.Scalar, index, 0)


def hide_keys(module: GraphModule, attention: Node, chosen: Node, size: Any) -> None:
    """Only chosen rows may be attended; ``size`` is how many there are in all."""
    emit = Builder(module.graph, attention, fake_mode_of(module))
    rank = attention.meta["val"].dim()
    mask: Any = emit(aten.reshape.default, chosen, [1] * (rank - 1) + [size])
    given: Any = attention.args[3] if len(attention.args) > 3 else None
    if given is not None and given.meta["val"].dtype is torch.bool:
        mask = emit(aten.logical_and.default, given, mask)
    elif given is not None:
        have = given.meta["val"]
        mask = emit(aten.where.self, mask, given, emit(aten.full.default, [], -math.inf, dtype=have.dtype, device=have.device))
    attention.args = (*attention.args[:3], mask, *attention.args[4:])


def join(
    program: ExportedProgram | None, module: GraphModule, closing: Node, whole: Node, dim: int, chosen: Node, size: Any
) -> None:
    """``cat([rows, rest])`` picks each row: the chosen from ``rows``, the others from ``whole``, of which they are the rest."""
    head, rest = cast(list[Node], closing.args[0])
    emit = Builder(closing.graph, closing, fake_mode_of(module))
    rank = closing.meta["val"].dim()
    view = emit(aten.reshape.default, chosen, [size if d == dim else 1 for d in range(rank)])
    picked = emit(aten.where.self, view, head, whole)
    if program is not None:
        program.graph_signature.replace_all_uses(closing.name, picked.name)
    swap(closing, picked)
    if not rest.users:
        rest.graph.erase_node(rest)


def swap(node: Node, value: Any) -> None:
    """Put a node or a number in the place of ``node``."""
    if isinstance(value, Node):
        node.replace_all_uses_with(value)
    else:
        for user in list(node.users):
            user.args = torch.fx.node.map_arg(user.args, lambda item: value if item is node else item)
            user.kwargs = torch.fx.node.map_arg(user.kwargs, lambda item: value if item is node else item)
    node.graph.erase_node(node)
