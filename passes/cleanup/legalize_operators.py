"""Operators a target has no word for, written with those it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sam3x.capture.decompose import expansion
from sam3x.passes.base import MatchFailure, Pass, PassResult, graph_modules

_ROUNDS = 8


class LegalizeOperatorsPass(Pass):
    """Expand single nodes by torch's own decompositions until only supported operators are left.

    Args:
        supported: whether the target converts an operator as it is.
        table: operator → decomposition, as ``torch.export.default_decompositions``.
    """

    name = "legalize_operators"

    def __init__(self, supported: Callable[[Any], bool], table: Mapping[Any, Callable[..., Any]]) -> None:
        self.supported, self.table = supported, dict(table)

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, failures = 0, []
        for _, module in graph_modules(program):
            for _ in range(_ROUNDS):
                nodes = [n for n in module.graph.nodes if self._unsupported(n)]
                done = sum(self._expand(module, node) for node in nodes)
                rewrites += done
                if not done:
                    failures += [MatchFailure(node=n.name, reason=f"{n.target} has no decomposition") for n in nodes]
                    break
        return PassResult(rewrites=rewrites, match_failures=tuple(failures))

    def _unsupported(self, node: Node) -> bool:
        target: Any = node.target
        return node.op == "call_function" and isinstance(target, torch._ops.OpOverload) and not self.supported(target)

    def _expand(self, module: GraphModule, node: Node) -> int:
        target: Any = node.target
        decomposition = self.table.get(target, target.decompose if target._can_decompose() else None)
        if decomposition is None:
            return 0
        inputs = list(node.all_input_nodes)
        traced = expansion(node, decomposition, {target: decomposition}, inputs)
        if any(n.target is target for n in traced.graph.nodes) or any(n.op == "get_attr" for n in traced.graph.nodes):
            return 0
        mapped = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), inputs, strict=True))
        with module.graph.inserting_before(node):
            output = module.graph.graph_copy(traced.graph, mapped)
        if not isinstance(output, Node):
            return 0
        node.replace_all_uses_with(output)
        module.graph.erase_node(node)
        return 1
