"""Canonical attention to plain matmul, softmax, matmul, with torch's answer for rows whose keys are all masked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sam3x.passes.base import Exactness, Missed, Pass, PassResult, graph_modules

_aten = torch.ops.aten
_SDPA = _aten.scaled_dot_product_attention.default


class DecomposeAttentionPass(Pass):
    """``aten.scaled_dot_product_attention`` → opset-18 arithmetic.

    torch gives zeros where a row's keys are all masked; a plain softmax gives NaN. Both the masked-row test and its repair
    work on the mask, which is small (it broadcasts over heads and mostly over queries), never on the scores.
    Source of the rule: ``_safe_softmax`` in aten/src/ATen/native/transformers/attention.cpp.
    """

    name = "decompose_attention"
    run_after = ("canonicalize_attention",)
    exactness = Exactness.ARITHMETIC

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, missed = 0, []
        for _, module in graph_modules(program):
            for node in list(module.graph.nodes):
                if node.op != "call_function" or node.target is not _SDPA:
                    continue
                reason = _refusal(node)
                if reason:
                    missed.append(Missed(node=node.name, reason=reason))
                    continue
                _rewrite(module, node)
                rewrites += 1
        return PassResult(program=program, modified=bool(rewrites), rewrites=rewrites, missed=tuple(missed))


def _argument(node: Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _refusal(node: Node) -> str | None:
    if _argument(node, 4, "dropout_p", 0.0):
        return "dropout inside the attention"
    if _argument(node, 5, "is_causal", False):
        return "causal flag"
    if node.kwargs.get("enable_gqa", False):
        return "grouped-query flag"
    return None


def _rewrite(module: GraphModule, node: Node) -> None:
    query, key, value = node.args[:3]
    mask = _argument(node, 3, "attn_mask", None)
    scale = _argument(node, 6, "scale", None)
    if scale is None:
        scale = 1.0 / math.sqrt(int(query.meta["val"].shape[-1]))
    fake_mode = query.meta["val"].fake_mode

    def emit(target: Any, *args: Any) -> Node:
        new = module.graph.call_function(target, args)
        values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        with fake_mode:
            new.meta["val"] = target(*values)
        return new

    with module.graph.inserting_before(node):
        rank = key.meta["val"].dim()
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        scores = emit(
            _aten.matmul.default, emit(_aten.mul.Tensor, query, float(scale)), emit(_aten.permute.default, key, swapped)
        )
        hidden = None
        if mask is not None:
            if mask.meta["val"].dtype == torch.bool:
                allowed = mask
                zero = emit(_aten.full.default, [], 0.0)
                additive = emit(_aten.where.self, mask, zero, emit(_aten.full.default, [], float("-inf")))
            else:
                allowed = emit(_aten.gt.Scalar, mask, float("-inf"))
                additive = mask
            visible = emit(_aten.any.dim, allowed, -1, True)
            hidden = emit(_aten.logical_not.default, visible)
            # a finite row keeps the softmax finite; its result is replaced below
            additive = emit(_aten.masked_fill.Scalar, additive, hidden, 0.0)
            scores = emit(_aten.add.Tensor, scores, additive)
        weights = emit(_aten._softmax.default, scores, -1, False)
        output = emit(_aten.matmul.default, weights, value)
        if hidden is not None:
            output = emit(_aten.masked_fill.Scalar, output, hidden, 0.0)
    node.replace_all_uses_with(output)
    module.graph.erase_node(node)
