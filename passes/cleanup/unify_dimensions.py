"""Sizes that the inputs agree on, as one symbol and one node."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sam3x.capture.program import erase_dead
from sam3x.passes.base import Pass, PassResult
from sam3x.passes.graph.aten_nodes import aten, expression, slice_args
from sam3x.passes.graph.sizes import unify_sizes


class UnifyDimensionsPass(Pass):
    """One symbol for each dynamic dimension, whatever input it stands in; no slice of all of it, nothing computed twice.

    That inputs agree on the batch is the contract of the artifact, which the graph alone does not say.

    Args:
        dim_names: of the captured program.
    """

    name = "unify_dimensions"

    def __init__(self, dim_names: Mapping[str, str]) -> None:
        self.dim_names = dict(dim_names)

    def call(self, program: ExportedProgram) -> PassResult:
        module = program.graph_module
        symbols = {
            str(symbol): symbol
            for node in module.graph.nodes
            if isinstance(node.meta.get("val"), torch.Tensor)
            for size in node.meta["val"].shape
            for symbol in expression(size).free_symbols
        }
        first: dict[str, Any] = {}
        same = {}
        for name, meaning in self.dim_names.items():
            if name in symbols and first.setdefault(meaning, symbols[name]) is not symbols[name]:
                same[symbols[name]] = first[meaning]
        rewrites = unify_sizes(module, same)
        sizes = {
            expression(size): (node, dim)
            for node in reversed(module.graph.nodes)
            if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)
            for dim, size in enumerate(node.meta["val"].shape)
        }
        for node in list(module.graph.nodes):
            if node.target is aten.slice.Tensor:
                source, dim, start, _, step = slice_args(node)
                whole = expression(source.meta["val"].shape[dim]) == expression(node.meta["val"].shape[dim])
                if whole and start in (0, None) and step == 1:
                    node.replace_all_uses_with(source)
                    rewrites += 1
            elif node.target in (aten.clone.default, aten.alias.default, aten.detach.default):
                node.replace_all_uses_with(node.args[0])
                rewrites += 1
            elif node.target is aten.sym_size.int and expression(node.meta["val"]) in sizes:
                node.args = sizes[expression(node.meta["val"])]
        erase_dead(module)
        rewrites += _share(module)
        return PassResult(rewrites=rewrites)


def _share(module: GraphModule) -> int:
    """One node for what is computed twice, as every layer computes its masks; returns how many went."""
    known: dict[Any, Node] = {}
    gone = 0
    for node in list(module.graph.nodes):
        target: Any = node.target
        sizes = target in (operator.floordiv, operator.mul)
        pure = sizes or (isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable)
        # a weight that two layers share: XNNPACK's partitioner joins what reads one node, and all that lies between
        pure &= "dequantize_per_channel" not in str(target)
        if node.op != "call_function" or not pure or torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            continue
        key = (target, repr(node.args), repr(node.kwargs))
        if known.setdefault(key, node) is not node:
            node.replace_all_uses_with(known[key])
            module.graph.erase_node(node)
            gone += 1
    return gone
