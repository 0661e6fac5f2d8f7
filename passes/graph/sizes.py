"""Sizes of a graph: one symbol for those that must be equal, nodes that compute them."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from sam3x.passes.graph.aten_nodes import aten, expression
from sam3x.passes.graph.cond_graph import substitute
from sam3x.passes.graph.emitter import Emitter, fake_mode_of, quietly

_PERMUTES_ROWS = {aten.permute.default, aten.transpose.int, aten.reshape.default, aten.linear.default, aten.add.Tensor}
_PERMUTES_ROWS |= {aten.where.self, aten.mul.Tensor, aten.layer_norm.default, aten.sub.Tensor}


def view_sizes(emit: Emitter, shape: Any) -> list[Any]:
    """A shape as arguments of a view: numbers, one −1, or nodes that compute a size."""
    unknown = [i for i, size in enumerate(shape) if not expression(size).is_Integer]
    if len(unknown) == 1:
        return [-1 if i in unknown else int(size) for i, size in enumerate(shape)]
    return [int(size) if i not in unknown else size_node(emit, expression(size)) for i, size in enumerate(shape)]


def size_node(emit: Emitter, size: sympy.Expr) -> Any:
    """What computes ``size`` where ``emit`` adds nodes: a number, a node that is there, a product of the inputs' dimensions."""
    known: dict[sympy.Expr, Any] = {}
    for node in itertools.takewhile(lambda node: node is not emit.before, emit.graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            known.setdefault(expression(value), node)
    if size in known:
        return known[size]
    for node in emit.graph.nodes:
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
