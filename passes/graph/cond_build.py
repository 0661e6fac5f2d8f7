"""Make a ``torch.cond`` out of parts of the graph it will stand in."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from sam3x.passes.graph.cond_graph import COND, Builder, aten, attach, copy_node, fake_mode_of, views_an_input

Body = Callable[[GraphModule, dict[Node, Any]], Node]
"""Adds a branch's nodes to its graph, given what each operand is there; returns the result."""


def new_cond(
    module: GraphModule, before: Node, predicate: Node, operands: Sequence[Node], bodies: Sequence[Body], like: Any
) -> Node:
    """A conditional in front of ``before``; returns the node that reads its one result.

    Args:
        operands: tensors of ``module`` that the branches read.
        bodies: of the true and of the false branch.
        like: the result's value (a fake tensor).
    """
    fake_mode = fake_mode_of(module)
    names = []
    for body, hint in zip(bodies, ("true_graph", "false_graph"), strict=True):
        branch = GraphModule({}, Graph())
        given: dict[Node, Any] = {}
        for index, operand in enumerate(operands):
            given[operand] = branch.graph.placeholder(f"arg{index}_1")
            given[operand].meta["val"] = operand.meta["val"]
        result = body(branch, given)
        if views_an_input(result):  # a branch may not return its operand
            result = Builder(branch.graph, None, fake_mode)(aten.clone.default, result)
        branch.graph.output((result,))
        branch.recompile()
        names.append(attach(module, branch, hint))
    with module.graph.inserting_before(before):
        branches = [module.graph.get_attr(name) for name in names]
        node = module.graph.call_function(COND, (predicate, *branches, tuple(operands)))
        node.meta["val"] = (like,)
        got = module.graph.call_function(operator.getitem, (node, 0))
        got.meta["val"] = like
    return got


def copied(source: GraphModule, nodes: Sequence[Node], result: Node, renamed: Mapping[Node, Node] | None = None) -> Body:
    """A body that is a copy of ``nodes`` of ``source``; ``renamed``: a node that they read → the operand to read instead."""

    def body(branch: GraphModule, given: dict[Node, Any]) -> Node:
        mapping: dict[Node, Any] = {**given, **{old: given[new] for old, new in (renamed or {}).items()}}
        for node in nodes:
            mapping[node] = copy_node(branch, source, node, mapping)
        return mapping[result]

    return body


def inputs_of(nodes: Sequence[Node]) -> list[Node]:
    """What ``nodes`` read from outside, in order: tensors alone where ``with_sizes`` put the sizes among them."""
    inside = set(nodes)
    found: dict[Node, None] = {}
    for node in nodes:
        for item in node.all_input_nodes:
            if item not in inside:
                found[item] = None
    return list(found)


def with_sizes(nodes: Sequence[Node]) -> list[Node]:
    """``nodes`` and the sizes they need, each computed from tensors, in graph order."""
    wanted: dict[Node, None] = dict.fromkeys(nodes)
    stack = [item for node in nodes for item in node.all_input_nodes]
    while stack:
        item = stack.pop()
        if item in wanted or isinstance(item.meta.get("val"), torch.Tensor) or item.op != "call_function":
            continue
        if isinstance(item.meta.get("val"), (torch.SymInt, int)):
            wanted[item] = None
            stack.extend(item.all_input_nodes)
    order = {node: index for index, node in enumerate(nodes[0].graph.nodes)}
    return sorted(wanted, key=order.__getitem__)
