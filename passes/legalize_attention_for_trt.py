"""Canonical attention to one that keeps a budget of memory where TensorRT has no fused kernel for it."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from sam3x.passes.attention_guard import attentions, guarded, read_sdpa, replace, zeroed
from sam3x.passes.attention_ops import TILED_ATTENTION
from sam3x.passes.attention_rewrite import Emitter
from sam3x.passes.base import Exactness, Missed, Pass, PassResult

UNLIMITED = 2**62
"""The budget of attention that TensorRT fuses."""


class LegalizeAttentionForTrtPass(Pass):
    """``aten.scaled_dot_product_attention`` → ``sam3x::tiled_attention``, rows that see no key repaired on the mask.

    TensorRT's attention layer gives no promise for such rows. In half precision the layer is fused and its scores are never in
    memory; in float32 they are, and ``budget`` bounds them.

    Args:
        budget: bytes that the scores of one attention in float32 may take.
    """

    name = "legalize_attention_for_trt"
    run_after = ("canonicalize_attention", "simplify_attention_masks", "convert_precision")
    exactness = Exactness.ARITHMETIC

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, missed = 0, []
        for module, node in attentions(program):
            found = read_sdpa(node)
            if isinstance(found, str):
                missed.append(Missed(node=node.name, reason=found))
                continue
            if len(found.query.meta["val"].shape) != 4:
                missed.append(Missed(node=node.name, reason=f"{len(found.query.meta['val'].shape)} dimensions, not 4"))
                continue
            emit = Emitter(module, node)
            mask, hidden = guarded(emit, found.mask)
            budget = self.budget if found.query.meta["val"].dtype is torch.float32 else UNLIMITED
            tiled = emit(TILED_ATTENTION, found.query, found.key, found.value, mask, found.scale, budget)
            replace(module, node, zeroed(emit, tiled, hidden))
            rewrites += 1
        return PassResult(program=program, modified=bool(rewrites), rewrites=rewrites, missed=tuple(missed))
