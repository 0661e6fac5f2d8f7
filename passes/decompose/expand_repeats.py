"""Repetitions of what has one row: views instead of copies."""

from __future__ import annotations

from typing import cast

from torch.fx import Node

from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import aten, expression, shape_of
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.node_pass import NodePass


class ExpandRepeatsPass(NodePass):
    """``aten.repeat`` along dimensions of size one → ``aten.expand``.

    Upstream's decoder repeats its queries for each picture (sam3/model/decoder.py). Torch-TensorRT's converter of ``repeat``
    multiplies sizes in Python, which a batch that the run decides is not.
    """

    name = "expand_repeats"
    operators = (aten.repeat.default,)

    def rewrite(self, emit: Emitter, node: Node) -> Node:
        source, repeats = cast("tuple[Node, list[int | Node]]", node.args)
        sizes = shape_of(source)
        new = len(repeats) - len(sizes)
        pairs = list(zip(sizes, repeats[new:], strict=True))
        if not all(_is_one(size) or _is_one(times) for size, times in pairs):
            raise NoMatchError("repeats more than one row")
        kept = [-1 if _is_one(times) else times for _, times in pairs]
        node.target, node.args = aten.expand.default, (source, [*repeats[:new], *kept])
        return node


def _is_one(size: object) -> bool:
    return expression(size.meta["val"] if isinstance(size, Node) else size) == 1
