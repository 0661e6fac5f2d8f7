"""Linear layers before the permutes and reshapes that only move rows, and views that undo each other removed."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sam3x.capture.program import erase_dead
from sam3x.passes.base import Pass, PassResult, graph_modules
from sam3x.passes.graph.aten_nodes import aten, expression
from sam3x.passes.graph.cond_graph import substitute
from sam3x.passes.graph.emitter import Emitter, fake_mode_of, quietly
from sam3x.passes.graph.view_layout import Layout, layout_of

_PERMUTES_ROWS = {aten.permute.default, aten.transpose.int, aten.reshape.default, aten.linear.default, aten.add.Tensor}
_PERMUTES_ROWS |= {aten.where.self, aten.mul.Tensor, aten.layer_norm.default, aten.sub.Tensor}


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
        view = emit(aten.reshape.default, view, _sizes(module, node, emit, node.meta["val"].shape))
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


def _sizes(module: GraphModule, before: Node, emit: Emitter, shape: Any) -> list[Any]:
    """A shape as arguments: numbers, one −1, or nodes that compute a size."""
    unknown = [i for i, size in enumerate(shape) if not expression(size).is_Integer]
    if len(unknown) == 1:
        return [-1 if i in unknown else int(size) for i, size in enumerate(shape)]
    return [
        int(size) if i not in unknown else size_node(module, before, emit, expression(size)) for i, size in enumerate(shape)
    ]


def size_node(module: GraphModule, before: Node, emit: Emitter, size: sympy.Expr) -> Node:
    """A node before ``before`` that computes ``size``: one that is there, or products of dimensions of the inputs."""
    known: dict[sympy.Expr, Any] = {}
    for node in module.graph.nodes:
        if node is before:
            break
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            known.setdefault(expression(value), node)
    if size in known:
        return known[size]
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            for dim, extent in enumerate(value.shape):
                if expression(extent) in size.free_symbols and expression(extent) not in known:
                    known[expression(extent)] = emit(aten.sym_size.int, node, dim)
    result: Any = None
    for factor in sympy.Mul.make_args(size):
        term = int(factor) if factor.is_Integer else known[factor]
        result = term if result is None else emit(operator.mul, result, term)
    return result


def unify_sizes(module: GraphModule, given: dict[sympy.Symbol, sympy.Symbol] | None = None) -> int:
    """One symbol for sizes that must be equal because an operator meets both; returns how many symbols went."""
    same = dict(given or {})

    def find(symbol: sympy.Expr) -> sympy.Expr:
        while symbol in same:
            symbol = same[symbol]
        return symbol

    def equal(left: Any, right: Any) -> None:
        a, b = find(expression(left)), find(expression(right))
        if a != b and a.is_Symbol and b.is_Symbol:
            same[a] = b

    fake_mode = fake_mode_of(module)
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if node.target is aten.sym_size.int:
            equal(node.args[0].meta["val"].shape[node.args[1]], value)
        elif node.target in _PERMUTES_ROWS and node.target is not aten.reshape.default and isinstance(value, torch.Tensor):
            if len(_symbols(node)) < 2:
                continue  # one symbol meets no other
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            try:
                with quietly(fake_mode):
                    again = node.target(*args, **kwargs)
            except Exception:  # sizes that the trace took for different ones
                continue
            for left, right in zip(again.shape, value.shape, strict=True):
                equal(left, right)
    if same:
        substitute(module, {symbol: find(symbol) for symbol in same})
    return len(same)


def _symbols(node: Node) -> set[sympy.Symbol]:
    """What the sizes of a node's operands and of its result are made of."""
    values = [item.meta.get("val") for item in (node, *node.all_input_nodes)]
    sizes = [size for value in values for size in (value.shape if isinstance(value, torch.Tensor) else (value,))]
    return {symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}
