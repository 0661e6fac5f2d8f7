"""Numbers that an exported program's operands stand for, known when it is exported."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sam3x.passes.graph.aten_nodes import CASTS, FILLS, NOOPS, RESHAPES, aten, dtype_of, same_shape, shape_of
from sam3x.passes.graph.cond_graph import conds_of, placeholders, read_cond

Constant = Callable[[Any], float | None]
"""The Python number an operand stands for, None when it is not a constant."""

_FOLDABLE = {
    getattr(getattr(aten, name), overload)
    for name, overload in (
        *(("full", "default"), ("full_like", "default"), ("scalar_tensor", "default"), ("lift_fresh_copy", "default")),
        *(("sqrt", "default"), ("rsqrt", "default"), ("reciprocal", "default"), ("neg", "default"), ("exp", "default")),
        *(("mul", "Tensor"), ("div", "Tensor"), ("pow", "Tensor_Scalar"), ("_to_copy", "default"), ("clone", "default")),
        *(("alias", "default"), ("detach", "default"), ("view", "default"), ("expand", "default")),
    )
}


class KnownNumbers:
    """Numbers known at export time: constants, buffers (parameters are not), arithmetic on them, operands of ``cond``."""

    def __init__(self, program: ExportedProgram) -> None:
        self._known: dict[Node, torch.Tensor | None] = {}
        signature = program.graph_signature
        changing = set(signature.buffers_to_mutate.values())
        buffers = {name: target for name, target in signature.inputs_to_buffers.items() if target not in changing}
        fixed = {**buffers, **signature.inputs_to_lifted_tensor_constants}
        values = {**program.state_dict, **program.constants}
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in fixed:
                tensor = values.get(fixed[node.name])
                known = isinstance(tensor, torch.Tensor) and tensor.numel() == 1 and tensor.device.type != "meta"
                self._known[node] = tensor.detach().cpu().reshape(()) if known else None
        self._bind(program.graph_module)

    def _bind(self, module: GraphModule) -> None:
        for node in conds_of(module):
            cond = read_cond(module, node)
            for branch in cond.branches:
                for placeholder, operand in zip(placeholders(branch), cond.operands, strict=True):
                    value = self._tensor(operand)
                    # a graph that two conds share is a constant only where both agree
                    if placeholder in self._known and not _equal(self._known[placeholder], value):
                        value = None
                    self._known[placeholder] = value
                self._bind(branch)

    def __call__(self, operand: Any) -> float | None:
        """The number ``operand`` stands for (every element of a constant tensor), or None."""
        if isinstance(operand, (bool, torch.SymInt, torch.SymFloat)) or operand is None:
            return None
        value = self._tensor(operand)
        return None if value is None else float(value)

    def _tensor(self, operand: Any) -> torch.Tensor | None:
        if isinstance(operand, (int, float)):
            return torch.tensor(operand, dtype=torch.float64)
        if not isinstance(operand, Node):
            return None
        if operand not in self._known:
            self._known[operand] = self._fold(operand)
        return self._known[operand]

    def _fold(self, node: Node) -> torch.Tensor | None:
        if node.op != "call_function" or node.target not in _FOLDABLE:
            return None
        if node.target in FILLS:
            value = node.args[0] if node.target is aten.scalar_tensor.default else node.args[1]
            return None if isinstance(value, Node) else torch.tensor(value, dtype=dtype_of(node))
        first = self._tensor(node.args[0])
        if first is None:
            return None
        if node.target in RESHAPES | NOOPS | CASTS | {aten.lift_fresh_copy.default}:
            return first.reshape(()).to(dtype_of(node))
        rest = [self._tensor(argument) for argument in node.args[1:]]
        if node.kwargs or any(value is None for value in rest):
            return None
        if node.target is aten.pow.Tensor_Scalar:
            return torch.pow(first, float(rest[0])).to(dtype_of(node))
        return node.target(first, *rest).reshape(()).to(dtype_of(node))


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and bool(a == b)


def number_factor(node: Node, constant: Constant) -> tuple[Node, float] | None:
    """``(x, c)`` when the node is ``x · c`` for a number c and keeps x's shape and dtype; None otherwise."""
    if node.op != "call_function":
        return None
    operands: list[tuple[Any, Any]] = []
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        operands = [(node.args[0], node.args[1]), (node.args[1], node.args[0])]
    elif node.target in (aten.div.Tensor, aten.div.Scalar):
        operands = [(node.args[0], node.args[1])]
    elif node.target is aten.neg.default:
        operands = [(node.args[0], -1.0)]
    for tensor, other in operands:
        number = constant(other)
        if isinstance(tensor, Node) and number is not None and same_shape(shape_of(tensor), shape_of(node)):
            if dtype_of(tensor) is not dtype_of(node):
                return None
            if node.target in (aten.div.Tensor, aten.div.Scalar):
                number = 1.0 / number if number else math.inf
            return tensor, number
    return None
