"""What a lowered graph hands to delegates and what is left to ExecuTorch's portable kernels: operators and FLOPs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

_PRODUCTS = {"linear", "bmm", "mm", "addmm", "matmul"}


def facts_of(graph: GraphModule) -> dict[str, Any]:
    """Counts for the manifest and ``sam3x inspect``.

    Args:
        graph: the edge graph after delegation, before memory planning.

    Returns:
        ``delegates`` (how many), ``delegated`` and ``portable`` (operator → count), ``gflops`` of one run at the largest sizes,
        and ``delegated_flops`` (their share, 0 to 1). A product is two FLOPs a term, any other operator one an element.
    """
    delegated: Counter[str] = Counter()
    portable: Counter[str] = Counter()
    flops = {True: 0.0, False: 0.0}
    delegates = 0
    for node, inside in _operators(graph):
        if _name(node) is None:
            continue
        (delegated if inside else portable)[str(_name(node))] += 1
        flops[inside] += _flops(node)
    delegates = sum(1 for node in graph.graph.nodes if _is_delegate(node))
    total = flops[True] + flops[False]
    return {
        "delegates": delegates,
        "delegated": dict(sorted(delegated.items())),
        "portable": dict(sorted(portable.items())),
        "gflops": round(total / 1e9, 3),
        "delegated_flops": round(flops[True] / total, 6) if total else 0.0,
    }


def _is_delegate(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "executorch_call_delegate"


def _operators(graph: GraphModule) -> Iterator[tuple[Node, bool]]:
    for node in graph.graph.nodes:
        if _is_delegate(node):
            lowered = getattr(graph, str(node.args[0].target))  # type: ignore[union-attr]
            yield from ((inner, True) for inner in lowered.original_module.graph.nodes)
        else:
            yield node, False


def _name(node: Node) -> str | None:
    """``linear`` for ``aten.linear.default``; None for what is no operator on tensors."""
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return None
    return name.split(".")[-2] if name.count(".") >= 2 else None


def _flops(node: Node) -> float:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return float(sum(_elements(item) for item in value if isinstance(item, torch.Tensor)))
    if _name(node) in _PRODUCTS:
        left: Any = node.args[1 if _name(node) == "addmm" else 0]
        return 2.0 * _elements(value) * _largest(left.meta["val"].shape[-1])
    return float(_elements(value))


def _elements(value: torch.Tensor) -> int:
    return math.prod(_largest(size) for size in value.shape)


def _largest(size: Any) -> int:
    """The upper end of a dynamic size; what was traced where there is none."""
    if isinstance(size, int):
        return size
    upper = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(upper) if upper.is_Integer else int(size.node.hint or 1)
