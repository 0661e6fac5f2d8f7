"""What every lowering of canonical attention shares: reading the node, and torch's zeros for rows whose keys are all masked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sam3x.passes.attention.finite_mask import hides_no_row
from sam3x.passes.base import graph_modules
from sam3x.passes.graph.aten_nodes import SDPA
from sam3x.passes.graph.emitter import Emitter

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Sdpa:
    """The operands of one ``aten.scaled_dot_product_attention``."""

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    scale: float


def attentions(program: ExportedProgram) -> list[tuple[GraphModule, Node]]:
    """Every canonical attention with its graph, branches included."""
    return [
        (module, node)
        for _, module in graph_modules(program)
        for node in module.graph.nodes
        if node.op == "call_function" and node.target is SDPA
    ]


def read_sdpa(node: Node) -> Sdpa | str:
    """Its operands, or the reason why it is no plain attention."""

    def argument(index: int, name: str, default: Any) -> Any:
        return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)

    if argument(4, "dropout_p", 0.0):
        return "dropout inside the attention"
    if argument(5, "is_causal", False):
        return "causal flag"
    if node.kwargs.get("enable_gqa", False):
        return "grouped-query flag"
    query, key, value = node.args[:3]
    scale = argument(6, "scale", None)
    if scale is None:
        scale = 1.0 / math.sqrt(int(query.meta["val"].shape[-1]))
    return Sdpa(node, query, key, value, argument(3, "attn_mask", None), float(scale))


def scalar(emit: Emitter, value: float, like: Node) -> Node:
    """A number in the dtype and on the device of ``like``."""
    have = like.meta["val"]
    return emit(_aten.full.default, [], value, dtype=have.dtype, device=have.device)


def guarded(emit: Emitter, mask: Node | None) -> tuple[Node | None, Node | None]:
    """(mask without rows that hide every key, (…, N or 1, 1) bool: the rows that did).

    torch gives zeros there and a softmax alone NaN. A row that hides everything is cleared, which keeps the softmax finite, and
    the lowering then zeroes its output. Both work on the mask, which is small (it broadcasts over heads and mostly over
    queries), never on the scores. A mask that is known to leave every row a key needs none of it.
    Source of the rule: ``_safe_softmax`` in aten/src/ATen/native/transformers/attention.cpp.
    """
    if mask is None:
        return None, None
    if hides_no_row(mask):
        return mask, None
    boolean = mask.meta["val"].dtype is torch.bool
    allowed = mask if boolean else emit(_aten.gt.Scalar, mask, float("-inf"))
    hidden = emit(_aten.logical_not.default, emit(_aten.any.dim, allowed, -1, True))
    if boolean:
        return emit(_aten.logical_or.default, mask, hidden), hidden
    return emit(_aten.where.self, hidden, scalar(emit, 0.0, mask), mask), hidden


def additive(emit: Emitter, mask: Node, like: Node) -> Node:
    """A mask as numbers to add to the scores of ``like``."""
    if mask.meta["val"].dtype is not torch.bool:
        return emit.cast(mask, like.meta["val"].dtype)
    return emit(_aten.where.self, mask, scalar(emit, 0.0, like), scalar(emit, float("-inf"), like))


def zeroed(emit: Emitter, output: Node, hidden: Node | None) -> Node:
    """``output`` with zeros in the rows that saw no key."""
    if hidden is None:
        return output
    return emit.shaped(output, output.meta["val"].shape, _aten.where.self, hidden, scalar(emit, 0.0, output), output)


def replace(module: GraphModule, node: Node, output: Node) -> None:
    """Put ``output`` in the place of ``node``."""
    node.replace_all_uses_with(output)
    module.graph.erase_node(node)
