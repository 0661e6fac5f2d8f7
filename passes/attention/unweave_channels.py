"""Query and key whose channels are woven from several tensors, as after a rotary embedding: one tensor after the other."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import SDPA, VIEWS, aten, same_shape, shape_of
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.node_pass import NodePass


class UnweaveChannelsPass(NodePass):
    """``stack([a, b], -1).flatten(-2)`` as query and as key of one attention → ``cat([a, b], -1)`` as both.

    Scores are sums over the channels, so both may be put in the same other order; woven, a runtime copies number by number.
    """

    name = "unweave_channels"
    operators = (SDPA,)
    run_after = ("canonicalize_attention", "decompose_complex")

    def rewrite(self, emit: Emitter, node: Node) -> Node | None:
        query, key = (_woven(item) for item in node.args[:2])
        if query is None and key is None:
            return None
        if query is None or key is None:
            raise NoMatchError(f"only the {'query' if key is None else 'key'} is woven")
        if len(query) != len(key):
            raise NoMatchError("query and key are woven from different numbers of tensors")
        if any(len(item.users) > 1 for item in node.args[:2]):
            raise NoMatchError("query or key is read elsewhere too")
        node.args = (*(emit(aten.cat.default, parts, -1) for parts in (query, key)), *node.args[2:])
        return node


def _woven(node: Any) -> list[Node] | None:
    """[a, b, …], each (…, D / n), of a tensor (…, D) that holds a[0], b[0], …, a[1], b[1], …; None of another."""
    if node.target not in VIEWS | {aten.reshape.default}:
        return None
    joined = node.args[0]
    if joined.target is not aten.cat.default:
        return None
    parts, *dim = joined.args
    rank = len(shape_of(joined))
    if (dim[0] if dim else 0) not in (-1, rank - 1) or not same_shape(shape_of(node)[:-1], shape_of(joined)[:-2]):
        return None
    singles = [part.args[0] for part in parts if part.target is aten.unsqueeze.default and part.args[1] in (-1, rank - 1)]
    return singles if len(singles) == len(parts) > 1 else None
