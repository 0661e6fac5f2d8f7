"""Linear layers before the permutes and reshapes that only move rows, and views that undo each other removed."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sam3x.capture.program import erase_dead
from sam3x.passes.base import Pass, PassResult, graph_modules
from sam3x.passes.graph.aten_nodes import aten, expression
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.sizes import unify_sizes, view_sizes
from sam3x.passes.graph.view_layout import Layout, layout_of


class CanonicalizeLayoutsPass(Pass):
    """``linear(view(x))`` → ``view(linear(x))`` where the view keeps the last dimension, and views that add up to nothing go.

    Sequence-first attention modules permute and flatten around every product; a phone copies memory for each. Sizes that the
    graph says are the same get one symbol first, without which no view can be followed.
    """

    name = "canonicalize_layouts"

    def call(self, program: ExportedProgram) -> PassResult:
        unified = unify_sizes(program.graph_module)
        rewrites = 0
        for _, module in graph_modules(program):
            for node in list(module.graph.nodes):
                if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
                    continue
                rewrites += _hoist(module, node) if node.target is aten.linear.default else _shorten(node)
            erase_dead(module)
        return PassResult(rewrites=rewrites, tidied=bool(unified))


def _shorten(node: Node) -> int:
    """Readers of a view that is its source read the source."""
    layout = layout_of(node)
    if layout.source is node or not layout.same or not node.users:
        return 0
    if any(user.op == "output" for user in node.users) and layout.source.op == "placeholder":
        return 0
    node.replace_all_uses_with(layout.source)
    return 1


def _hoist(module: GraphModule, node: Node) -> int:
    layout = layout_of(node.args[0])
    if _rows(layout) is None:  # as behind dac's half of a batch of two
        layout = layout_of(node.args[0], whole=True)
    source, width = layout.source, layout.source.meta["val"].dim() - 1
    order = _rows(layout)
    if source is node.args[0] or order is None or width < 1:
        return 0
    emit = Emitter(module, node)
    product = emit(aten.linear.default, source, *node.args[1:])
    view = product
    if order != list(range(width)):
        view = emit(aten.permute.default, view, [*order, width])
    if [expression(size) for size in view.meta["val"].shape] != [expression(size) for size in node.meta["val"].shape]:
        view = emit(aten.reshape.default, view, view_sizes(emit, node.meta["val"].shape))
    node.replace_all_uses_with(view)
    module.graph.erase_node(node)
    return 1


def _rows(layout: Layout) -> list[int] | None:
    """In which order the view reads the source's leading dimensions; None when it does more to them, or touches the last."""
    rank = layout.source.meta["val"].dim()
    if any(layout.offsets.values()) or layout.dims[-1] != layout.whole(rank - 1):
        return None
    digits = [digit for digits in layout.dims[:-1] for digit in digits]
    if any(digit.dim < 0 or (digit,) != layout.whole(digit.dim) for digit in digits):
        return None
    found = [digit.dim for digit in digits]
    ones = [dim for dim in range(rank - 1) if not layout.whole(dim)]
    return [*ones, *found] if sorted([*ones, *found]) == list(range(rank - 1)) else None
