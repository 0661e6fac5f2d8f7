"""The passes every target gets, in order."""

from __future__ import annotations

from sam3x.passes.base import Pass
from sam3x.passes.pipeline import PassPipeline


def default_pipeline(branches: str = "cond") -> PassPipeline:
    """No-ops go first, so that nothing stands between the steps of an attention; targets rely on canonical attention.

    Conditionals are narrowed to what differs, and with ``branches="select"`` become data flow.
    """
    from sam3x.passes.attention.canonicalize_attention import CanonicalizeAttentionPass
    from sam3x.passes.branches.if_convert import IfConvertPass
    from sam3x.passes.branches.narrow_cond import NarrowCondPass
    from sam3x.passes.cleanup.canonicalize_reductions import CanonicalizeReductionsPass
    from sam3x.passes.cleanup.eliminate_noops import EliminateNoopsPass

    passes: list[Pass] = [EliminateNoopsPass(), CanonicalizeReductionsPass(), CanonicalizeAttentionPass(), NarrowCondPass()]
    if branches == "select":
        passes.append(IfConvertPass())
    return PassPipeline(tuple(passes))
