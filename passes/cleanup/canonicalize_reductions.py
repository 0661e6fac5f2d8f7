"""The cast that a reduction of bools does silently, spelt out."""

from __future__ import annotations

import torch
from torch.fx import Node

from sam3x.passes.graph.aten_nodes import aten, dtype_of
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.node_pass import NodePass


class CanonicalizeReductionsPass(NodePass):
    """``sum`` of a bool tensor → ``sum`` of its integers: no other format counts bools.

    Upstream's ``get_valid_ratio`` (sam3/model/model_misc.py) sums a mask to find how much of a feature map is valid.
    """

    name = "canonicalize_reductions"
    operators = (aten.sum.default, aten.sum.dim_IntList, aten.cumsum.default, aten.prod.default, aten.prod.dim_int)

    def rewrite(self, emit: Emitter, node: Node) -> Node | None:
        source = node.args[0]
        if dtype_of(source) is not torch.bool:
            return None
        node.args = (emit.cast(source, dtype_of(node)), *node.args[1:])
        return node
