"""What the dimensions of the graph's inputs mean."""

from __future__ import annotations

DYNAMIC_DIMS: dict[str, tuple[str | None, ...]] = {
    "tgt": ("batch", "tokens", None),
    "query_pos": ("batch", "tokens", None),
    "memory": ("batch", "prompt_length", None),
    "pos": ("batch", "prompt_length", None),
    "tgt_mask": ("tokens", "tokens"),
    "memory_mask": ("tokens", "prompt_length"),
    "tgt_key_padding_mask": ("batch", "tokens"),
    "memory_key_padding_mask": ("batch", "prompt_length"),
    "prompt": ("prompt_length", "batch", None),
    "prompt_key_padding_mask": ("batch", "prompt_length"),
}
"""Meaning of every input dimension; ``src*`` maps are ("batch", None, …)."""


def dims_of(name: str, rank: int) -> tuple[str | None, ...]:
    """What the dimensions of an input mean; flags have none."""
    if name.startswith("src"):
        return ("batch", *[None] * (rank - 1))
    return DYNAMIC_DIMS.get(name, (None,) * rank)
