"""The passes every target gets, in order."""

from __future__ import annotations

from sam3x.passes.pipeline import PassPipeline


def default_pipeline() -> PassPipeline:
    """No-ops go first, so that nothing stands between the steps of an attention; targets rely on canonical attention."""
    from sam3x.passes.canonicalize_attention import CanonicalizeAttentionPass
    from sam3x.passes.canonicalize_reductions import CanonicalizeReductionsPass
    from sam3x.passes.eliminate_noops import EliminateNoopsPass

    return PassPipeline((EliminateNoopsPass(), CanonicalizeReductionsPass(), CanonicalizeAttentionPass()))
