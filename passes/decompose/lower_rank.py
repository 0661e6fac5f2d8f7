"""Permutes of many dimensions with those that stay side by side as one."""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Node

from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import NOOPS, SHAPING, VIEWS, aten, permutation, same_size, shape_of
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.node_pass import NodePass
from sam3x.passes.graph.sizes import view_sizes


class LowerRankPass(NodePass):
    """A permute of more than ``rank`` dimensions, between two views → one of fewer: neighbours that stay neighbours are one.

    The windows of a vision transformer are a permute of six dimensions, which four do. Core ML has tensors of five.

    Args:
        rank: the most dimensions that a tensor may have.
    """

    name = "lower_rank"
    operators = (aten.reshape.default, *VIEWS)

    def __init__(self, rank: int = 5) -> None:
        self.rank = rank

    def rewrite(self, emit: Emitter, node: Node) -> Node | None:
        permute: Any = _under(node.args[0], NOOPS)
        order = permutation(permute)
        if order is None or len(order) <= self.rank:
            return None
        sizes = shape_of(permute.args[0])
        together: list[list[int]] = []
        for dim in order:
            if same_size(sizes[dim], 1):
                continue
            if together and together[-1][-1] + 1 == dim:
                together[-1].append(dim)
            else:
                together.append([dim])
        if len(together) > self.rank:
            raise NoMatchError(f"{len(together)} dimensions go separate ways")
        stand = sorted(together)
        merged = [math.prod(sizes[dim] for dim in dims) for dims in stand]
        source = _under(permute.args[0], SHAPING | NOOPS)
        view = emit(aten.reshape.default, source, view_sizes(emit, merged))
        turned = emit(aten.permute.default, view, [stand.index(dims) for dims in together])
        node.target, node.args = aten.reshape.default, (turned, node.args[1])
        return node


def _under(node: Any, through: set[Any]) -> Node:
    while node.op == "call_function" and node.target in through:
        node = node.args[0]
    return node  # type: ignore[no-any-return]
