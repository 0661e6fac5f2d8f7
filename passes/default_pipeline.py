"""The passes every target gets, in order."""

from __future__ import annotations

from sam3x.passes.base import Pass
from sam3x.passes.pipeline import PassPipeline


def default_pipeline(branches: str = "cond") -> PassPipeline:
    """Complex numbers, numbers of elements and no-ops go first, so that nothing stands between the steps of an attention.

    Conditionals are narrowed to what differs, and with ``branches="select"`` become data flow.
    """
    from sam3x.passes.attention.canonicalize_attention import CanonicalizeAttentionPass
    from sam3x.passes.branches.if_convert import IfConvertPass
    from sam3x.passes.branches.narrow_cond import NarrowCondPass
    from sam3x.passes.cleanup.canonicalize_reductions import CanonicalizeReductionsPass
    from sam3x.passes.cleanup.eliminate_noops import EliminateNoopsPass
    from sam3x.passes.decompose.decompose_complex import DecomposeComplexPass
    from sam3x.passes.decompose.decompose_numel import DecomposeNumelPass

    passes: list[Pass] = [
        DecomposeComplexPass(),
        DecomposeNumelPass(),
        EliminateNoopsPass(),
        CanonicalizeReductionsPass(),
        CanonicalizeAttentionPass(),
        NarrowCondPass(),
    ]
    if branches == "select":
        passes.append(IfConvertPass())
    return PassPipeline(tuple(passes))
