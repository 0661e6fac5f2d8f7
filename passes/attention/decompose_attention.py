"""Canonical attention to plain matmul, softmax, matmul, with torch's answer for rows whose keys are all masked."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from sam3x.passes.attention.guard import Sdpa, additive, attentions, guarded, read_sdpa, replace, zeroed
from sam3x.passes.base import MatchFailure, Pass, PassResult
from sam3x.passes.graph.emitter import Emitter

_aten = torch.ops.aten


class DecomposeAttentionPass(Pass):
    """``aten.scaled_dot_product_attention`` → arithmetic that every target has, in the dtype of the query."""

    name = "decompose_attention"
    run_after = ("canonicalize_attention", "simplify_attention_masks", "tile_attention", "fuse_multi_head_attention")

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, failures = 0, []
        for module, node in attentions(program):
            found = read_sdpa(node)
            if isinstance(found, str):
                failures.append(MatchFailure(node=node.name, reason=found))
                continue
            _rewrite(module, found)
            rewrites += 1
        return PassResult(rewrites=rewrites, match_failures=tuple(failures))


def _rewrite(module: GraphModule, found: Sdpa) -> None:
    emit = Emitter(module, found.node)
    rank = found.key.meta["val"].dim()
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    scaled = emit(_aten.mul.Tensor, found.query, found.scale)
    # torch compares the sizes of what it broadcasts: not possible for rows that only a run counts, once as u and once as u²/u
    lead = found.query.meta["val"].shape[:-1]
    keys, channels = found.key.meta["val"].shape[-2], found.value.meta["val"].shape[-1]
    turned = emit(_aten.permute.default, found.key, swapped)
    scores = emit.shaped(found.query, (*lead, keys), _aten.matmul.default, scaled, turned)
    mask, hidden = guarded(emit, found.mask)
    if mask is not None:
        scores = emit.shaped(scores, (*lead, keys), _aten.add.Tensor, scores, additive(emit, mask, found.query))
    weights = emit(_aten._softmax.default, scores, -1, False)
    output = emit.shaped(found.query, (*lead, channels), _aten.matmul.default, weights, found.value)
    replace(module, found.node, zeroed(emit, output, hidden))
