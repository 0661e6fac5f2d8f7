"""Operators that leave every value as it is, and checks that tracing has already made, out of the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sam3x.capture.program import erase_dead
from sam3x.passes.base import Pass, PassResult, graph_modules

_aten = torch.ops.aten
_ALWAYS = {_aten.alias.default, _aten.detach.default, _aten.lift_fresh_copy.default}
_COPIES = {_aten.clone.default, _aten.contiguous.default, _aten._to_copy.default, _aten.to.dtype, _aten.to.dtype_layout}
_MOVES = {
    _aten.expand.default,
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.slice.Tensor,
    _aten.narrow.default,
}
_FACTORS = {_aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar}
_DROPOUTS = {_aten.dropout.default: 2, _aten.native_dropout.default: 2}
_TRACING_CHECKS = {_aten._assert_tensor_metadata.default}


class EliminateNoopsPass(Pass):
    """Remove no-ops: copies that keep type and memory layout, moves to the same shape, dropout that is off, ``x * 1``.

    A copy that a graph returns stays where the output would otherwise be an input, a weight or another output; a copy that
    changes the memory layout stays because a ``view`` may depend on it. ``x + 0`` stays: it turns -0.0 into 0.0.
    Assertions on sizes and values stay: they guard the symbols; those on a tensor's type were settled by tracing.
    """

    name = "eliminate_noops"

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, tidied = 0, False
        for prefix, module in graph_modules(program):
            done = _eliminate(program if not prefix else None, module)
            dead = erase_dead(module)
            rewrites += done
            tidied |= dead
        return PassResult(rewrites=rewrites, tidied=tidied)


def _eliminate(root: ExportedProgram | None, module: GraphModule) -> int:
    done = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _TRACING_CHECKS and not node.users:
            module.graph.erase_node(node)
            done += 1
            continue
        kept = _same_value(node)
        if kept is None or _would_alias(node, kept):
            continue
        if root is not None:
            root.graph_signature.replace_all_uses(node.name, kept.name)
        node.replace_all_uses_with(kept)
        module.graph.erase_node(node)
        done += 1
    return done


def _same_value(node: Node) -> Node | None:
    """The tensor that ``node`` equals bit for bit, memory layout included; None where it is no such thing."""
    target: Any = node.target
    if target in _DROPOUTS:
        return _dropout_source(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if target in _ALWAYS:
        return source if _alike(node, source) else None
    if target in _COPIES | _MOVES or target is _aten.permute.default:
        if target is _aten.permute.default and list(node.args[1]) != list(range(len(node.args[1]))):
            return None
        return source if _alike(node, source) and not _steps(node) else None
    if target in _FACTORS:
        factor = node.args[1]
        one = isinstance(factor, (int, float)) and not isinstance(factor, bool) and factor == 1
        return source if one and not node.kwargs and _alike(node, source) else None
    return None


def _dropout_source(node: Node) -> Node | None:
    train = node.args[2] if len(node.args) > 2 else node.kwargs.get("train", True)
    off = train is False or node.args[1] == 0
    source = node.args[0]
    if node.target is _aten.native_dropout.default:
        return None  # its second result is a mask; capture leaves none of these in an evaluated module
    return source if off and isinstance(source, Node) and _alike(node, source) else None


def _steps(node: Node) -> bool:
    """Whether a slice of the same size could still skip elements: never, except with a step that is not 1."""
    return node.target is _aten.slice.Tensor and len(node.args) > 4 and bool(node.args[4] != 1)


def _alike(node: Node, source: Node) -> bool:
    """Same type, device, shape and strides, for every value of the symbols."""
    a, b = node.meta.get("val"), source.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    if a.dtype is not b.dtype or a.device != b.device or a.layout is not b.layout or a.dim() != b.dim():
        return False
    return all(
        statically_known_true(x == y) and (statically_known_true(x == 1) or statically_known_true(s == t))
        for x, y, s, t in zip(a.shape, b.shape, a.stride(), b.stride(), strict=True)
    )


def _would_alias(node: Node, kept: Node) -> bool:
    """Whether an output of the graph would become an input, a constant or an output that is there already."""
    outputs = [user for user in node.users if user.op == "output"]
    if not outputs:
        return False
    return kept.op != "call_function" or _views_an_input(kept) or any(user.op == "output" for user in kept.users)


def _views_an_input(node: Node) -> bool:
    """Whether ``node`` may share memory with a placeholder: a chain of views leads there."""
    while node.op == "call_function":
        target: Any = node.target
        schema = getattr(target, "_schema", None)
        if schema is None or not any(result.alias_info is not None for result in schema.returns):
            return False
        if not isinstance(node.args[0], Node):
            return True
        node = node.args[0]
    return True
