"""Operators a target lowers by hand: attention in tiles of queries, and attention over packed heads.

Both compute what ``aten.scaled_dot_product_attention`` does, so that a graph holding them still runs and can be verified.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("sam3x", "FRAGMENT")
_library.define("tiled_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, int budget) -> Tensor")
_library.define(
    "multi_head_attention(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? bias, int num_heads, float scale,"
    " int budget)"
    " -> Tensor"
)

TILED_ATTENTION = torch.ops.sam3x.tiled_attention.default
"""(…, N, D), (…, S, D), (…, S, E), mask, scale, bytes the scores may take → (…, N, E). No row of the mask hides every key."""

MULTI_HEAD_ATTENTION = torch.ops.sam3x.multi_head_attention.default
"""(B, N, H·D), (B, S, H·D), (B, S, H·E), bool (B, S) True = visible, float (B or 1, H or 1, N, S), H, scale,
bytes the scores of a masked attention may take → (B, N, H·E)."""


@torch.library.impl(_library, "tiled_attention", "CompositeExplicitAutograd")
def _tiled(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, budget: int) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)


@torch.library.impl(_library, "tiled_attention", "Meta")
def _tiled_shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, budget: int) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@torch.library.impl(_library, "multi_head_attention", "CompositeExplicitAutograd")
def _multi_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    num_heads: int,
    scale: float,
    budget: int,
) -> Tensor:
    q, k, v = (x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2) for x in (query, key, value))
    mask = bias
    if key_mask is not None:
        mask = torch.where(key_mask[:, None, None, :], 0.0 if bias is None else bias, float("-inf")).to(query.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return out.transpose(1, 2).flatten(-2)


@torch.library.impl(_library, "multi_head_attention", "Meta")
def _multi_head_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    num_heads: int,
    scale: float,
    budget: int,
) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[1], value.shape[2]))
