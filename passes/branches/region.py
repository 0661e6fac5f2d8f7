"""One branch of a conditional while it is taken apart, and the two graphs of a smaller one in the making."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._sympy.symbol import SymT, symbol_is_type

from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import aten, expression
from sam3x.passes.graph.cond_graph import Cond, copy_node, is_heavy, placeholders, views_an_input
from sam3x.passes.graph.emitter import Emitter

MISSING: Any = object()
"""No value outside stands for the pair."""


class Side:
    """One branch: its graph, and which of its values are known outside."""

    def __init__(self, branch: GraphModule, operands: Sequence[Any]) -> None:
        self.branch = branch
        self.known: dict[Node, Any] = dict(zip(placeholders(branch), operands, strict=True))
        self.inputs = set(self.known)
        self.run: set[Node] = set()  # heavy nodes that a conditional made here already runs

    def canonical(self, value: Any) -> Any:
        """An input of the branch is the value it stands for."""
        return self.known[value] if isinstance(value, Node) and value in self.inputs else value

    def cone(self, values: Iterable[Any]) -> list[Node]:
        """Nodes of the branch needed for ``values`` from what is known outside, in order."""
        found: set[Node] = set()
        todo = [value for value in values if isinstance(value, Node) and value.graph is self.branch.graph]
        while todo:
            node = todo.pop()
            if node not in found and not self.given(node):
                found.add(node)
                todo += node.all_input_nodes
        return [node for node in self.branch.graph.nodes if node in found]

    def given(self, node: Node) -> bool:
        """Whether a conditional takes ``node`` as an operand; sizes are read anew from tensors that it takes."""
        if node not in self.known:
            return False
        if not isinstance(node.meta.get("val"), (torch.SymInt, int)) or node in self.inputs:
            return True
        return not all(self._readable(item) for item in node.all_input_nodes)

    def _readable(self, node: Node) -> bool:
        if node in self.known:
            return True
        return isinstance(node.meta.get("val"), torch.SymInt) and all(self._readable(item) for item in node.all_input_nodes)


class Region:
    """The two graphs of a conditional in the making, over common operands."""

    def __init__(self, sides: Sequence[Side], val: Callable[[Any], Any]) -> None:
        self.sides, self.val = sides, val
        self.operands: list[Node] = []
        self.modules = tuple(GraphModule({}, Graph()) for _ in range(2))
        self.inputs: tuple[dict[Node, Node], ...] = ({}, {})
        self.nodes: tuple[dict[Node, Node], ...] = ({}, {})

    def operand(self, side: int, value: Node, like: Node) -> Node:
        """The placeholder for a value outside; ``like`` says what this branch knows of it."""
        if value not in self.operands:
            self.operands.append(value)
        if value not in self.inputs[side]:
            graph = self.modules[side].graph
            with graph.inserting_after(graph._root):
                node = graph.placeholder(value.name)
            node.meta["val"] = self.val(like)
            self.inputs[side][value] = node
        return self.inputs[side][value]

    def need(self, side: int, value: Any) -> Node:
        """``value`` of a branch, in its new graph."""
        return self._all(side, [value])[0]

    def _all(self, side: int, values: Sequence[Any]) -> list[Any]:
        home, module, nodes = self.sides[side], self.modules[side], self.nodes[side]
        for node in home.cone(values):
            if node in nodes:
                continue
            if is_heavy(node):
                if node in home.run:
                    raise NoMatchError(f"{node.target} ('{node.name}'), which one branch alone runs, would run twice")
                home.run.add(node)
            mapping = {item: self._given(side, item) for item in node.all_input_nodes}
            nodes[node] = copy_node(module, home.branch, node, mapping)
        return [self._given(side, value) for value in values]

    def _given(self, side: int, value: Any) -> Any:
        home = self.sides[side]
        if not isinstance(value, Node):
            return value
        if value in self.nodes[side]:
            return self.nodes[side][value]
        if value.graph is not home.branch.graph:
            return self.operand(side, value, value)  # of what one branch knows nothing, the value outside tells
        known = home.known[value]
        return self.operand(side, known, value) if isinstance(known, Node) else known

    def row_vector(self, side: int, count: Any, vector: Node) -> Node:
        """A vector of ``count`` elements: the one that ``count`` was read from, or the first of ``vector``."""
        source = count.args[0] if isinstance(count, Node) and count.target is aten.sym_size.int else None
        if isinstance(source, Node) and source.meta["val"].dim() == 1 and source.meta["val"].dtype is self.val(vector).dtype:
            return self.need(side, source)
        (end,) = self._all(side, [count])
        given = self.operand(side, vector, vector)
        return Emitter(self.modules[side], None)(aten.slice.Tensor, given, 0, 0, end)

    def close(self, returned: Sequence[tuple[Node, Node]]) -> tuple[GraphModule, ...]:
        for side, module in enumerate(self.modules):
            taken: set[Node] = set()
            results = []
            for pair in returned:
                value = pair[side]
                if memory_order(pair[0].meta["val"]) != memory_order(pair[1].meta["val"]):
                    value = Emitter(module, None)(aten.clone.default, value, memory_format=torch.contiguous_format)
                elif value in taken or views_an_input(value):  # a branch may return neither an operand nor one value twice
                    value = Emitter(module, None)(aten.clone.default, value)
                taken.add(value)
                results.append(value)
            inputs = [self.operand(side, value, value) for value in self.operands]
            for node in reversed(inputs):  # both branches take the operands in one order
                module.graph._root.append(node)
            module.graph.output(tuple(results))
            module.graph.lint()
            module.recompile()
        return self.modules


def val_of(value: Any) -> Any:
    return value.meta.get("val") if isinstance(value, Node) else value


def sizes_of(value: torch.Tensor) -> list[Any]:
    return [expression(size) for size in value.shape]


def sizes_are(node: Node, sizes: list[Any]) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and sizes_of(value) == sizes


def views_of(cond: Cond) -> dict[Node, Any]:
    """Operand → its value as both branches see it: they may know that two sizes are equal where the graph around does not."""
    views: dict[Node, Any] = {}
    for operand, true, false in zip(cond.operands, *(placeholders(branch) for branch in cond.branches), strict=True):
        left, right = true.meta["val"], false.meta["val"]
        if isinstance(operand, Node) and isinstance(left, torch.Tensor) and sizes_of(left) == sizes_of(right):
            views[operand] = left
    return views


def is_size(value: Any) -> bool:
    found = val_of(value)
    return isinstance(found, (int, torch.SymInt)) and not isinstance(found, bool)


def is_unbacked(size: sympy.Expr) -> bool:
    return isinstance(size, sympy.Symbol) and symbol_is_type(size, SymT.UNBACKED_INT)


def memory_order(value: torch.Tensor) -> list[int]:
    """Dimensions from the largest step to the smallest: torch wants the branches of a conditional to agree on it."""
    return sorted(range(value.dim()), key=lambda d: (_steps(value, d), -d), reverse=True)


def _steps(value: torch.Tensor, dim: int) -> int:
    """Stride with every symbol taken for 2: enough to tell the order of dimensions."""
    step = expression(value.stride(dim))
    return int(step.subs(dict.fromkeys(step.free_symbols, 2)))
