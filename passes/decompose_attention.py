"""Canonical attention to plain matmul, softmax, matmul, with torch's answer for rows whose keys are all masked."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from sam3x.passes.attention_guard import Sdpa, additive, attentions, guarded, read_sdpa, replace, zeroed
from sam3x.passes.attention_rewrite import Emitter
from sam3x.passes.base import Exactness, Missed, Pass, PassResult

_aten = torch.ops.aten


class DecomposeAttentionPass(Pass):
    """``aten.scaled_dot_product_attention`` → arithmetic that every target has, in the dtype of the query."""

    name = "decompose_attention"
    run_after = ("canonicalize_attention", "simplify_attention_masks", "tile_attention", "fuse_multi_head_attention")
    exactness = Exactness.ARITHMETIC

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, missed = 0, []
        for module, node in attentions(program):
            found = read_sdpa(node)
            if isinstance(found, str):
                missed.append(Missed(node=node.name, reason=found))
                continue
            _rewrite(module, found)
            rewrites += 1
        return PassResult(program=program, modified=bool(rewrites), rewrites=rewrites, missed=tuple(missed))


def _rewrite(module: GraphModule, found: Sdpa) -> None:
    emit = Emitter(module, found.node)
    rank = found.key.meta["val"].dim()
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    scaled = emit(_aten.mul.Tensor, found.query, found.scale)
    scores = emit(_aten.matmul.default, scaled, emit(_aten.permute.default, found.key, swapped))
    mask, hidden = guarded(emit, found.mask)
    if mask is not None:
        scores = emit(_aten.add.Tensor, scores, additive(emit, mask, found.query))
    weights = emit(_aten._softmax.default, scores, -1, False)
    replace(module, found.node, zeroed(emit, emit(_aten.matmul.default, weights, found.value), hidden))
