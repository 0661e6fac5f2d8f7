"""Sizes that tracing knows as numbers, written as numbers; what was only there to tell them goes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from sam3x.passes.base import Pass, PassResult, graph_modules
from sam3x.passes.graph.aten_nodes import aten, expression
from sam3x.passes.graph.cond_graph import sweep
from sam3x.passes.graph.emitter import put

_VIEWS = (aten.reshape.default, aten.view.default)


class FoldStaticSizesPass(Pass):
    """``sym_size`` and arithmetic whose result is fixed → the number; so is the ``-1`` of a view whose size there is fixed.

    TensorRT infers a ``-1`` where it runs: beside another tensor of that size it does not know that they are equal.

    dac at a fixed batch of one leaves a conditional of which only the result's size is read, and that is one in both branches.
    """

    name = "fold_static_sizes"
    run_after = ("narrow_cond", "if_convert")

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites = 0
        for _, module in graph_modules(program):
            for node in list(module.graph.nodes):
                value = _number(node.meta.get("val"))
                rewrites += node.target in _VIEWS and _inferred(node)
                if node.op != "call_function" or value is None:
                    continue
                put(node, value)
                rewrites += 1
        if rewrites:
            sweep(program.graph_module)
        return PassResult(rewrites=rewrites)


def _inferred(node: Node) -> bool:
    """Write the size that a view infers; whether there was one to write."""
    source, shape = cast("tuple[Node, list[Any]]", node.args)
    if -1 not in shape:
        return False
    size = _number(node.meta["val"].shape[shape.index(-1)])
    if size is None:
        return False
    node.args = (source, [size if asked == -1 else asked for asked in shape])
    return True


def _number(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        return None
    known = expression(value)
    return int(known) if known.is_Integer else None
