"""Permutes and reshapes moved below the linears they commute with, and put together until they cancel."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sam3x.capture.program import erase_dead
from sam3x.passes.base import Pass, PassResult, graph_modules
from sam3x.passes.graph.aten_nodes import SHAPING, aten, permutation, shape_of
from sam3x.passes.graph.axes import Axis, Layout, axes_of, leaves, regrouped


@dataclass(frozen=True, slots=True)
class _Moved:
    """A tensor as another one, ``source``, with its axes in another order and grouping."""

    source: Node
    layout: Layout


class SinkPermutesPass(Pass):
    """Follow every dimension through permutes, reshapes and linears; lay a tensor out anew only where something else reads it.

    ``linear(permute(x))`` becomes ``permute(linear(x))`` where the last dimension stays; a chain of moves becomes the shortest
    one that does the same, or nothing.
    """

    name = "sink_permutes"

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites = 0
        for _, module in graph_modules(program):
            before = _moves(module)
            worker = _Worker(module)
            worker.run()
            erase_dead(module)
            rewrites += max(before - _moves(module), 0)
        return PassResult(rewrites=rewrites)


def _moves(module: GraphModule) -> int:
    return sum(1 for node in module.graph.nodes if node.target in SHAPING or permutation(node) is not None)


class _Worker:
    """One graph: what every node is in terms of an earlier one, and the new nodes made so far."""

    def __init__(self, module: GraphModule) -> None:
        self.graph = module.graph
        self.own: dict[Node, Layout] = {}
        self.moved: dict[Node, _Moved] = {}
        self.made: dict[tuple[Any, ...], Node] = {}
        self.ends: dict[Node, Node] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if (node.op == "call_function" and not self._follow(node)) or node.op == "output":
                self._read(node)

    def _of(self, node: Node) -> _Moved:
        if node not in self.moved:
            self.own[node] = tuple(axes_of(size) for size in shape_of(node))
            self.moved[node] = _Moved(node, self.own[node])
        return self.moved[node]

    def _follow(self, node: Node) -> bool:
        """Whether ``node`` only moves what it reads; remember how."""
        source = node.args[0] if node.args else None
        if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
            return False
        order = permutation(node)
        if order is not None:
            before = self._of(source)
            self.moved[node] = _Moved(before.source, tuple(before.layout[dim] for dim in order))
            return True
        if node.target in SHAPING:
            before = self._of(source)
            layout = regrouped(before.layout, shape_of(node))
            if layout is not None:
                self.moved[node] = _Moved(before.source, layout)
            return layout is not None
        if node.target is aten.clone.default and not any(user.op == "output" for user in node.users):
            before = self._of(source)
            if before.source is not source:
                self.moved[node] = before
            return before.source is not source
        return node.target is aten.linear.default and self._linear(node, source)

    def _linear(self, node: Node, source: Node) -> bool:
        before = self._of(source)
        channels = leaves(before.layout[-1])
        if before.source is source or not channels:
            return False
        if channels != leaves(self.own[before.source][-1]):
            before = self._gathered(before, channels, source)
        if self._plain(before):
            return False
        with self.graph.inserting_before(node):
            new = self.graph.call_function(node.target, (before.source, *node.args[1:]), node.kwargs)
        shape = [*shape_of(before.source)[:-1], shape_of(node)[-1]]
        new.meta = {**node.meta, "val": _empty(shape, node)}
        self._of(new)
        made = self.own[new][-1]
        self.own[new] = (*self.own[before.source][:-1], made)
        self.moved[new] = _Moved(new, self.own[new])
        self.moved[node] = _Moved(new, (*before.layout[:-1], made))
        return True

    def _gathered(self, before: _Moved, channels: tuple[Axis, ...], like: Node) -> _Moved:
        """The same with the channels together in the last dimension of a new source, the others in the old source's order."""
        rows = (tuple(axis for axis in leaves(dim) if axis not in channels) for dim in self.own[before.source])
        layout = (*(dim for dim in rows if dim), channels)
        node = self._arranged(_Moved(before.source, layout), like)
        if node not in self.own:
            self.own[node] = layout
            self.moved[node] = _Moved(node, layout)
        return _Moved(node, before.layout)

    def _plain(self, moved: _Moved) -> bool:
        return _flat(moved.layout) == _flat(self.own[moved.source]) and len(moved.layout) == len(self.own[moved.source])

    def _read(self, node: Node) -> None:
        """Give a node that needs its operands as they are the shortest way to them."""
        for operand in node.all_input_nodes:
            moved = self.moved.get(operand)
            if moved is None or moved.source is operand:
                continue
            if node.target is aten.sym_size.int:
                group = leaves(moved.layout[node.args[1]])
                where = [dim for dim, own in enumerate(self.own[moved.source]) if leaves(own) == group and group]
                if where:
                    node.args = (moved.source, where[0])
                    continue
            new = self._arranged(moved, operand)
            if not (node.op == "output" and new.op == "placeholder"):
                node.replace_input_with(operand, new)

    def _insert(self, source: Node, target: Any, args: tuple[Any, ...], val: Any) -> Node:
        after = self.ends.get(source, source)
        while after.next.op == "placeholder":
            after = after.next
        with self.graph.inserting_after(after):
            new = self.graph.call_function(target, args)
        new.meta["val"] = val
        self.ends[source] = new
        return new

    def _arranged(self, moved: _Moved, like: Node) -> Node:
        """``like`` made from its source: split, permute, merge, each only where needed."""
        source, own = moved.source, tuple(leaves(dim) for dim in self.own[moved.source])
        wanted = tuple(leaves(dim) for dim in moved.layout)
        key = (source, tuple(tuple(map(id, dim)) for dim in wanted))
        if wanted == own:
            return source
        if key not in self.made:
            node, blocks = source, _blocks(own, wanted)
            flat = [block for dim in wanted for block in blocks if block[0] in dim]
            target = sorted(flat, key=lambda block: list(itertools.chain(*wanted)).index(block[0]))
            if target != blocks:
                if tuple(blocks) != own:
                    node = self._reshape(source, node, blocks, like)
                order = [blocks.index(block) for block in target]
                shape = [shape_of(node)[dim] for dim in order]
                node = self._insert(source, aten.permute.default, (node, order), _empty(shape, like))
            if tuple(target) != wanted or target == blocks:
                node = self._reshape(source, node, wanted, like)
            self.made[key] = node
        return self.made[key]

    def _reshape(self, source: Node, node: Node, groups: Sequence[tuple[Axis, ...]], like: Node) -> Node:
        shape: list[Any] = []
        args: list[Any] = []
        for group in groups:
            size, arg = 1, None
            for axis in group:
                size = size * axis.size
                part = axis.size if isinstance(axis.size, int) else self._size(source, axis)
                arg = part if arg is None else self._times(source, arg, part)
            shape.append(size)
            args.append(1 if arg is None else arg)
        return self._insert(source, aten.reshape.default, (node, args), _empty(shape, like))

    def _size(self, source: Node, axis: Axis) -> Node:
        key = (source, id(axis))
        if key not in self.made:
            dim = next(dim for dim, own in enumerate(self.own[source]) if leaves(own) == (axis,))
            self.made[key] = self._insert(source, aten.sym_size.int, (source, dim), shape_of(source)[dim])
        return self.made[key]

    def _times(self, source: Node, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            return left * right
        value = [part.meta["val"] if isinstance(part, Node) else part for part in (left, right)]
        return self._insert(source, operator.mul, (left, right), value[0] * value[1])


def _flat(layout: Layout) -> tuple[tuple[Axis, ...], ...]:
    return tuple(leaves(dim) for dim in layout)


def _blocks(own: Layout, wanted: Layout) -> list[tuple[Axis, ...]]:
    """The source's axes in its order, neighbours together that stay neighbours inside one dimension of both."""
    follows = {a: b for dim in wanted for a, b in itertools.pairwise(dim)}
    blocks: list[tuple[Axis, ...]] = []
    for dim in own:
        start = len(blocks)
        for axis in dim:
            if len(blocks) > start and follows.get(blocks[-1][-1]) is axis:
                blocks[-1] = (*blocks[-1], axis)
            else:
                blocks.append((axis,))
    return blocks


def _empty(shape: Sequence[Any], like: Node) -> torch.Tensor:
    have = like.meta["val"]
    with have.fake_mode:
        return torch.empty(list(shape), dtype=have.dtype, device=have.device)
