"""Which nodes of two branches correspond: sequence alignment in data-flow order, as in function merging.

Rocha, Petoumenos, Wang, Cole and Leather, *Function Merging by Sequence Alignment* (CGO 2019), align two functions'
instructions with Needleman and Wunsch's algorithm; here the sequences are the nodes worth a common place: products, attention,
norms, and what joins values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from sam3x.passes.graph.aten_nodes import HEAVY, aten
from sam3x.passes.graph.cond_graph import is_heavy

_WEIGHTS = {
    aten.linear.default: (1, 2),
    aten.layer_norm.default: (2, 3),
    aten.convolution.default: (1, 2),
    aten.native_group_norm.default: (1, 2),
    aten.rms_norm.default: (2,),
    aten.addmm.default: (0, 2),
}
"""Operands that must be the same value outside for two nodes to be one."""
COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default}
_HEAVY_SCORE, _NORM_SCORE, _JOIN_SCORE = 1000, 20, 1


def align(true: GraphModule, false: GraphModule, same: Callable[[Any, Any], bool]) -> list[tuple[Node, Node]]:
    """Pairs of corresponding nodes in the order of both branches; ``same`` says whether two operands are one value outside."""
    left, right = _sequence(true), _sequence(false)
    best = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    scores: dict[tuple[int, int], int] = {}
    for i in range(len(left) - 1, -1, -1):
        for j in range(len(right) - 1, -1, -1):
            score = _score(left[i], right[j], same)
            scores[i, j] = score
            best[i][j] = max(best[i + 1][j], best[i][j + 1], best[i + 1][j + 1] + score if score else 0)
    pairs, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if scores[i, j] and best[i][j] == best[i + 1][j + 1] + scores[i, j]:
            pairs.append((left[i], right[j]))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


def _sequence(branch: GraphModule) -> list[Node]:
    """Nodes worth aligning: a chain of cheap nodes between them follows on its own."""
    return [node for node in branch.graph.nodes if node.op == "call_function" and (_worth(node) or _joins(node))]


def _worth(node: Node) -> bool:
    return node.target in HEAVY or node.target in _WEIGHTS


def _joins(node: Node) -> bool:
    tensors = [item for item in node.all_input_nodes if isinstance(item.meta.get("val"), torch.Tensor)]
    return (
        isinstance(node.target, torch._ops.OpOverload) and len(tensors) > 1 and isinstance(node.meta.get("val"), torch.Tensor)
    )


def _score(left: Node, right: Node, same: Callable[[Any, Any], bool]) -> int:
    if left.target is not right.target or not alike(left, right):
        return 0
    target: Any = left.target
    weights = _WEIGHTS.get(target, ())
    for position in weights:
        a, b = (node.args[position] if len(node.args) > position else None for node in (left, right))
        if not same(a, b):
            return 0
    if is_heavy(left):
        return _HEAVY_SCORE
    return _NORM_SCORE if weights else _JOIN_SCORE


def alike(left: Node, right: Node) -> bool:
    """Same type and rank, same arguments but for nodes and sizes."""
    a, b = left.meta.get("val"), right.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dtype is not b.dtype or a.dim() != b.dim():
        return False
    if len(left.args) != len(right.args) or left.kwargs.keys() != right.kwargs.keys():
        return False
    pairs = [*zip(left.args, right.args, strict=True), *((left.kwargs[key], right.kwargs[key]) for key in left.kwargs)]
    return all(_plain_alike(x, y) for x, y in pairs)


def _plain_alike(x: Any, y: Any) -> bool:
    if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)):
        return len(x) == len(y) and all(_plain_alike(a, b) for a, b in zip(x, y, strict=True))
    if isinstance(x, Node) or isinstance(y, Node):
        return x is not None and y is not None
    return type(x) is type(y) and x == y
