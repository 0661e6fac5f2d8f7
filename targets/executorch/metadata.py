"""What a lowered graph hands to delegates and what is left to ExecuTorch's portable kernels: operators and FLOPs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

_PRODUCTS = {"linear", "bmm", "mm", "addmm", "matmul"}
_IN_PLACE = {"_softmax", "add", "sub", "mul", "relu", "gelu", "rsqrt", "sigmoid"}


def metadata_of(graph: GraphModule) -> dict[str, Any]:
    """Counts for the manifest and ``sam3x inspect``.

    Args:
        graph: the edge graph after delegation, before memory planning.

    Returns:
        ``delegates`` (how many), ``delegated`` and ``portable`` (operator → count), ``gflops`` of one run at the largest sizes,
        and ``delegated_flops`` (their share, 0 to 1). A product is two FLOPs a term, any other operator one an element.
        ``workspace_bytes``: what the tensors inside one delegate take at once at the largest sizes, in the one that needs most.
    """
    delegated: Counter[str] = Counter()
    portable: Counter[str] = Counter()
    flops = {True: 0.0, False: 0.0}
    delegates = 0
    for node, inside in _operators(graph):
        if _name(node) is None:
            continue
        (delegated if inside else portable)[str(_name(node))] += 1
        flops[inside] += flops_of(node)
    delegates = sum(1 for node in graph.graph.nodes if _is_delegate(node))
    total = flops[True] + flops[False]
    return {
        "delegates": delegates,
        "delegated": dict(sorted(delegated.items())),
        "portable": dict(sorted(portable.items())),
        "gflops": round(total / 1e9, 3),
        "delegated_flops": round(flops[True] / total, 6) if total else 0.0,
        "workspace_bytes": max((_workspace(part) for part in _delegates(graph)), default=0),
    }


def _is_delegate(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "executorch_call_delegate"


def _operators(graph: GraphModule) -> Iterator[tuple[Node, bool]]:
    yield from ((inner, True) for part in _delegates(graph) for inner in part.nodes)
    yield from ((node, False) for node in graph.graph.nodes if not _is_delegate(node))


def _delegates(graph: GraphModule) -> Iterator[Graph]:
    """The graph inside every delegate, in the order it runs."""
    for node in graph.graph.nodes:
        if _is_delegate(node):
            yield getattr(graph, str(node.args[0].target)).original_module.graph


def _workspace(graph: Graph) -> int:
    """The most bytes alive at once, in the order of the nodes, as XNNPACK plans them: inputs and outputs have a place of their
    own, and what works element by element, softmax too, writes over an input that nothing else reads."""
    own = {node for node in graph.nodes if _name(node) is not None} - set(graph.output_node().all_input_nodes)
    last = {item: node for node in graph.nodes for item in node.all_input_nodes}
    alive = most = 0
    for node in graph.nodes:
        dying = [_bytes(item) for item in node.all_input_nodes if last[item] is node and item in own]
        made = _bytes(node) if node in own else 0
        over = made if _name(node) in _IN_PLACE and made in dying else 0
        most = max(most, alive + made - over)
        alive += made - sum(dying)
    return most


def _bytes(node: Node) -> int:
    value = node.meta["val"]
    return int(_elements(value)) * value.element_size() if isinstance(value, torch.Tensor) else 0


def _name(node: Node) -> str | None:
    """``linear`` for ``aten.linear.default``; None for what is no operator on tensors."""
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return None
    return name.split(".")[-2] if name.count(".") >= 2 else None


def flops_of(node: Node) -> float:
    """FLOPs of a node at the largest sizes: two a term of a product, one an element of any other operator."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        several = value if isinstance(value, (tuple, list)) else ()
        return float(sum(_elements(item) for item in several if isinstance(item, torch.Tensor)))
    if _name(node) in _PRODUCTS:
        left: Any = node.args[1 if _name(node) == "addmm" else 0]
        return 2.0 * _elements(value) * _largest(left.meta["val"].shape[-1])
    return float(_elements(value))


def _elements(value: torch.Tensor) -> int:
    return math.prod(_largest(size) for size in value.shape)


def _largest(size: Any) -> int:
    """A dynamic size where every symbol is at its upper end; what was traced where there is none."""
    if isinstance(size, int):
        return size
    env, value = size.node.shape_env, size.node.expr
    value = value.xreplace({symbol: env.bound_sympy(symbol).upper for symbol in value.free_symbols})
    return int(value) if value.is_Integer else int(size.node.hint or 1)
