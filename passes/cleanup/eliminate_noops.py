"""Operators that leave every value as it is, and checks that tracing has already made, out of the graph."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sam3x.capture.program import erase_dead
from sam3x.passes.base import Pass, PassResult, graph_modules
from sam3x.passes.graph.aten_nodes import CASTS, NOOPS, RESHAPES, argument, aten, slice_args
from sam3x.passes.graph.cond_graph import views_an_input

_KEEPING = NOOPS | CASTS | RESHAPES
_KEEPING |= {aten.lift_fresh_copy.default, aten.to.dtype_layout, aten.slice.Tensor, aten.narrow.default}
"""What may leave its operand as it is."""
_FACTORS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
_TRACING_CHECKS = {aten._assert_tensor_metadata.default}


class EliminateNoopsPass(Pass):
    """Remove no-ops: copies that keep type and memory layout, moves to the same shape, dropout that is off, ``x * 1``.

    A copy that a graph returns stays where the output would otherwise be an input, a weight or another output; a copy that
    changes the memory layout stays because a ``view`` may depend on it. ``x + 0`` stays: it turns -0.0 into 0.0.
    Assertions on sizes and values stay: they guard the symbols; those on a tensor's type were settled by tracing.
    """

    name = "eliminate_noops"

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, tidied = 0, False
        for _, module in graph_modules(program):
            rewrites += _eliminate(module)
            tidied |= erase_dead(module)
        return PassResult(rewrites=rewrites, tidied=tidied)


def _eliminate(module: GraphModule) -> int:
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
        node.replace_all_uses_with(kept)
        module.graph.erase_node(node)
        done += 1
    return done


def _same_value(node: Node) -> Node | None:
    """The tensor that ``node`` equals bit for bit, memory layout included; None where it is no such thing."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if node.target is aten.dropout.default:
        off = argument(node, 2, "train", True) is False or node.args[1] == 0
    elif node.target in _FACTORS:
        factor = node.args[1]
        off = not node.kwargs and isinstance(factor, (int, float)) and not isinstance(factor, bool) and factor == 1
    elif node.target is aten.permute.default:
        off = list(node.args[1]) == list(range(len(node.args[1])))
    else:
        stepped = node.target is aten.slice.Tensor and slice_args(node)[4] != 1  # elements left out though the size is the same
        off = node.target in _KEEPING and not stepped
    return source if off and _alike(node, source) else None


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
    return kept.op != "call_function" or views_an_input(kept) or any(user.op == "output" for user in kept.users)
