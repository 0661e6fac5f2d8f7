"""Which operations compute below float32 where the others stay, after ``torch.autocast``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from sam3x.passes.base import graph_modules
from sam3x.passes.graph.aten_nodes import HEAVY, aten
from sam3x.passes.graph.op_paths import op_name

SMALLEST_OUTPUT = 16
"""Features of a linear worth less than float32: below, it is a head whose numbers are boxes or scores."""

SMALLEST = 256
"""Numbers in a weight worth int8."""

_SUMS = {"layer_norm", "native_layer_norm", "native_group_norm", "_softmax", "_safe_softmax", "softmax", "_log_softmax"}
_SUMS |= {"sum", "mean", "var", "var_mean", "cumsum", "prod", "logsumexp", "linalg_vector_norm", "norm"}
_POSITIONS = {"sin", "cos", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "pow", "sqrt", "rsqrt", "reciprocal"}
_POSITIONS |= {"sigmoid", "atan2", "grid_sampler_2d", "roi_align", "_to_copy"}


def worth_int8(shape: Sequence[int]) -> bool:
    """Tell whether int8 takes a weight of this shape, output channels first: it is large, and of no small head."""
    return shape[0] >= SMALLEST_OUTPUT and math.prod(shape) >= SMALLEST


def computes_low(node: Node) -> bool:
    """Whether it is a product, a convolution or attention, and no small head."""
    if node.target not in HEAVY:
        return False
    return node.target is not aten.linear.default or node.args[1].meta["val"].shape[0] >= SMALLEST_OUTPUT  # type: ignore[union-attr]


def stays_in_float32(program: ExportedProgram) -> set[Node]:
    """Return the nodes that sum (norms, softmax), make positions, refine boxes, or are small heads."""
    nodes = [node for _, module in graph_modules(program) for node in module.graph.nodes if node.op == "call_function"]
    return {node for node in nodes if _is_wide(node)}


def follows(node: Node) -> bool:
    """Whether it computes in what it is given: adds a residual, scales, activates."""
    return not computes_low(node) and not _is_wide(node)


def boxes(program: ExportedProgram) -> set[Node]:
    """Return small heads with what follows them up to the next product or norm, and what is made of weights and sizes alone.

    These are boxes as they are refined, and encodings of positions. Little else is float32 then, so that a delegate that takes
    operators of one dtype keeps large pieces of the graph.
    """
    inputs = {item.arg.name for item in program.graph_signature.input_specs if item.kind is InputKind.USER_INPUT}
    own = {name for name, target in program.graph_signature.inputs_to_parameters.items() if "." in target}
    known = {node for node in program.graph.nodes if node.op == "placeholder" and node.name not in inputs}
    found: set[Node] = set()
    for node in program.graph.nodes:
        if node.op != "call_function" or computes_low(node) or op_name(node) in _SUMS:
            continue
        if node.target in HEAVY and node.args[1].name not in own:  # what passes add is no head: one of an attention, a mean
            continue
        tensors = [item for item in node.all_input_nodes if isinstance(item.meta.get("val"), torch.Tensor)]
        if all(item in known for item in tensors):
            known.add(node)
            found.add(node)
        elif node.target in HEAVY or not found.isdisjoint(set(tensors) - known):
            found.add(node)
    return found


def _is_wide(node: Node) -> bool:
    return (node.target in HEAVY and not computes_low(node)) or op_name(node) in _SUMS | _POSITIONS
