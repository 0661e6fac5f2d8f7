"""How many elements a tensor has, as the product of its sizes."""

from __future__ import annotations

import math
import operator
from typing import Any, cast

from torch.export import ExportedProgram
from torch.fx import Node

from sam3x.passes.base import Pass, PassResult, graph_modules
from sam3x.passes.graph.aten_nodes import aten, shape_of
from sam3x.passes.graph.emitter import Emitter, put


class DecomposeNumelPass(Pass):
    """``x.numel()`` → the product of the sizes of ``x``, a number where all are fixed.

    torch's converter to ONNX and coremltools know sizes, and no number of elements.
    """

    name = "decompose_numel"

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites = 0
        for _, module in graph_modules(program):
            for node in module.graph.find_nodes(op="call_function", target=aten.sym_numel.default):
                emit, source = Emitter(module, node), cast("Node", node.args[0])
                sizes = [emit.dim(source, dim) for dim in range(len(shape_of(source)))]
                count: Any = math.prod(size for size in sizes if isinstance(size, int))
                for size in (size for size in sizes if isinstance(size, Node)):
                    count = emit(operator.mul, count, size)
                put(node, count)
                rewrites += 1
        return PassResult(rewrites=rewrites)
