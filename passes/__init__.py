"""Graph passes over captured programs (import name ``sam3x.passes``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __name__ != "sam3x.passes":
    raise ImportError("import this package as 'sam3x.passes', not as a top-level folder of the repository")

if TYPE_CHECKING:
    from sam3x.passes.attention.canonicalize_attention import register_attention_op, unregister_attention_op

__all__ = ["register_attention_op", "unregister_attention_op"]


def __getattr__(name: str) -> Any:
    """Import the public names where they are first used, because they need torch (PEP 562)."""
    if name in __all__:
        from sam3x.passes.attention import canonicalize_attention

        return getattr(canonicalize_attention, name)
    raise AttributeError(f"module 'sam3x.passes' has no attribute '{name}'")
