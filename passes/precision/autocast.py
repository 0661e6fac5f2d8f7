"""Which operations compute below float32 where the others stay, after ``torch.autocast``."""

from __future__ import annotations

from torch.fx import Node

from sam3x.passes.graph.aten_nodes import HEAVY, aten
from sam3x.passes.graph.op_paths import op_name

SMALLEST_OUTPUT = 16
"""Features of a linear worth less than float32: below, it is a head whose numbers are boxes or scores."""

_SUMS = {"layer_norm", "native_layer_norm", "native_group_norm", "_softmax", "_safe_softmax", "softmax", "_log_softmax"}
_SUMS |= {"sum", "mean", "var", "var_mean", "cumsum", "prod", "logsumexp", "linalg_vector_norm", "norm"}
_POSITIONS = {"sin", "cos", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "pow", "sqrt", "rsqrt", "reciprocal"}
_POSITIONS |= {"sigmoid", "atan2", "grid_sampler_2d", "roi_align", "_to_copy"}


def computes_low(node: Node) -> bool:
    """Whether it is a product, a convolution or attention, and no small head."""
    if node.target not in HEAVY:
        return False
    return node.target is not aten.linear.default or node.args[1].meta["val"].shape[0] >= SMALLEST_OUTPUT  # type: ignore[union-attr]


def stays_in_float32(node: Node) -> bool:
    """Whether it sums (norms, softmax), makes positions, refines boxes, or is a small head."""
    return (node.target in HEAVY and not computes_low(node)) or op_name(node) in _SUMS | _POSITIONS


def follows(node: Node) -> bool:
    """Whether it computes in what it is given: adds a residual, scales, activates."""
    return not computes_low(node) and not stays_in_float32(node)
