"""The casts that torch's operators make silently of operands of several types, spelt out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from sam3x.passes.base import Pass, PassResult, graph_modules

_aten = torch.ops.aten
_JOINS = {_aten.cat.default, _aten.stack.default}
_CONDITIONS: dict[Any, int] = {_aten.where.self: 0, _aten.masked_fill.Scalar: 1, _aten.masked_fill.Tensor: 1}
"""Operator → the place of an operand that is a condition, and is not cast."""


class InsertTypePromotionPass(Pass):
    """``arange(n) * 0.1`` → ``arange(n).to(float32) * 0.1``: ONNX has no operator over operands of two types.

    torch.onnx has a pass for that, which runs the whole program again and enters no branch.
    """

    name = "insert_type_promotion"

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites = 0
        for _, module in graph_modules(program):
            for node in list(module.graph.nodes):
                if (wanted := _computes_in(node)) is not None:
                    rewrites += _cast_operands(node, wanted)
        return PassResult(rewrites=rewrites)


def _cast_operands(node: Node, wanted: torch.dtype) -> int:
    """How many tensors were of another type."""
    casts: dict[Node, Node] = {}

    def cast(source: Node) -> Node:
        if _dtype(source) in (None, wanted):
            return source
        if source not in casts:
            with node.graph.inserting_before(node):
                casts[source] = node.graph.call_function(_aten._to_copy.default, (source,), {"dtype": wanted})
            casts[source].meta["val"] = source.meta["val"].to(wanted)
        return casts[source]

    condition = _CONDITIONS.get(node.target)
    node.args = tuple(operand if place == condition else map_arg(operand, cast) for place, operand in enumerate(node.args))
    return len(casts)


def _computes_in(node: Node) -> torch.dtype | None:
    """The type that a node's operands are cast to; None where it is no pointwise operator over tensors, nor joins them."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or not (torch.Tag.pointwise in target.tags or target in _JOINS):
        return None
    made = _dtype(node)
    if made is not torch.bool or target in _CONDITIONS:
        return made
    operands = [item.meta.get("val") if isinstance(item, Node) else item for item in node.args]
    operands = [item for item in operands if isinstance(item, (Tensor, int, float, torch.SymInt, torch.SymFloat))]
    if len(operands) != 2:
        return None
    plain = {torch.SymInt: 1, torch.SymFloat: 1.0}
    left, right = (plain.get(type(item), item) for item in operands)
    return torch.result_type(left, right)


def _dtype(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None
