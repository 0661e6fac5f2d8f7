"""Sizes that a division leaves whole, written without the division."""

from __future__ import annotations

import operator

import sympy
from torch.fx import Node

from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import divided, expression
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.node_pass import NodePass
from sam3x.passes.graph.sizes import size_node


class CanonicalizeSizesPass(NodePass):
    """``numel // width``, ``batch * heads // heads`` → a size of an input, or a product of such sizes and a number.

    coremltools divides sizes in float, and has no shape for what is reshaped to the result.
    """

    name = "canonicalize_sizes"
    operators = (operator.floordiv,)
    run_after = ("unify_dimensions",)

    def rewrite(self, emit: Emitter, node: Node) -> Node:
        size = divided(expression(node.meta["val"]))
        if size.is_Integer or not all(factor.is_Integer or factor.is_Symbol for factor in sympy.Mul.make_args(size)):
            raise NoMatchError(f"{size} is no product of sizes that a run tells")
        return size_node(emit, size)
