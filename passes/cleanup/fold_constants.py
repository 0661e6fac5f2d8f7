"""What depends on weights alone is computed once, at export."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from sam3x.capture.program import erase_dead
from sam3x.passes.base import Pass, PassResult
from sam3x.passes.graph.constants import Constants
from sam3x.passes.graph.emitter import fake_mode_of


class FoldConstantsPass(Pass):
    """Parts of a weight (``split``, ``slice``, ``permute``, …) and arithmetic on weights become weights of their own.

    A node that makes more bytes than it reads is left alone, and a weight that nothing reads any more goes.
    """

    name = "fold_constants"

    def call(self, program: ExportedProgram) -> PassResult:
        module = program.graph_module
        constants = Constants(program, fake_mode_of(module))
        values: dict[Node, Any] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder" and (value := constants.value(node)) is not None:
                values[node] = value
            elif _foldable(node) and node.all_input_nodes and all(item in values for item in node.all_input_nodes):
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda item: values[item])
                with torch.no_grad():
                    result = node.target(*args, **kwargs)
                if _bytes(result) <= sum(_bytes(values[item]) for item in node.all_input_nodes):
                    values[node] = result
        rewrites = 0
        for node, value in values.items():
            if node.op == "call_function" and isinstance(value, torch.Tensor):
                readers = [user for user in node.users if user not in values or not isinstance(values[user], torch.Tensor)]
                if readers:
                    hint = next(iter(_roots(node))).name.removeprefix("p_")
                    new = constants.add(value, hint)
                    for user in readers:
                        user.replace_input_with(node, new)
                    rewrites += 1
        erase_dead(module)
        dropped = constants.drop_unused()
        return PassResult(rewrites=rewrites, tidied=bool(dropped))


def _foldable(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    target: Any = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value) if isinstance(value, (tuple, list)) else 0


def _roots(node: Node) -> list[Node]:
    if node.op == "placeholder":
        return [node]
    return [root for item in node.all_input_nodes for root in _roots(item)]
