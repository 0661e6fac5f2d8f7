"""Attention modules with the call of ``nn.MultiheadAttention``, each written as somebody writes attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Projections, heads split and joined; a subclass says how scores become outputs.

    ``attend(q, k, v, mask, hide)`` gets (B, H, N, D), (B, H, S, D) twice, an additive float mask or None, and a bool mask,
    True where a query may not attend, or None; both broadcast to (B, H, N, S).
    """

    kv_heads_divisor = 1

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, d_model // num_heads
        self.kv_heads = num_heads // self.kv_heads_divisor if num_heads % self.kv_heads_divisor == 0 else num_heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, self.kv_heads * self.head_dim)
        self.v_proj = nn.Linear(d_model, self.kv_heads * self.head_dim)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        q, k, v = (
            x.reshape(x.shape[0], x.shape[1], heads, self.head_dim).transpose(1, 2)
            for x, heads in (
                (self.q_proj(query), self.num_heads),
                (self.k_proj(key), self.kv_heads),
                (self.v_proj(value), self.kv_heads),
            )
        )
        if self.kv_heads != self.num_heads:
            k, v = (x.repeat_interleave(self.num_heads // self.kv_heads, dim=1) for x in (k, v))
        hide = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        mask = None
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            hide = attn_mask if hide is None else hide | attn_mask
        elif attn_mask is not None:
            mask = attn_mask
        joined = self.attend(q, k, v, mask, hide).transpose(1, 2)
        return self.out_proj(joined.reshape(joined.shape[0], joined.shape[1], -1)), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, hide: Tensor | None) -> Tensor:
        raise NotImplementedError


def _masked(scores: Tensor, mask: Tensor | None, hide: Tensor | None, value: float = -math.inf) -> Tensor:
    if mask is not None:
        scores = scores + mask
    return scores if hide is None else scores.masked_fill(hide, value)


class Matmul(Attention):
    """Scale after the product, -inf in the scores."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(self.head_dim)
        return _masked(scores, mask, hide).softmax(dim=-1) @ v


class ScaleFirst(Attention):
    """Queries scaled first, a large finite number hides."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        return _masked(scores, mask, hide, -1e9).softmax(dim=-1) @ v


class ScaleSplit(Attention):
    """A root of the scale on each side."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        root = self.head_dim**-0.25
        scores = (q * root) @ (k * root).transpose(-2, -1)
        return _masked(scores, mask, hide).softmax(dim=-1) @ v


class Einsum(Attention):
    """Named dimensions."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        scores = torch.einsum("bhnd,bhsd->bhns", q, k) * self.head_dim**-0.5
        return torch.einsum("bhns,bhsd->bhnd", _masked(scores, mask, hide).softmax(dim=-1), v)


class Bmm(Attention):
    """Heads folded into the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        b, h, n, d = q.shape
        scores = torch.bmm(q.reshape(b * h, n, d) * d**-0.5, k.reshape(b * h, -1, d).transpose(1, 2))
        weights = _masked(scores.reshape(b, h, n, -1), mask, hide).softmax(dim=-1)
        return torch.bmm(weights.reshape(b * h, n, -1), v.reshape(b * h, -1, d)).reshape(b, h, n, d)


class KeepMask(Attention):
    """``where`` with what may be attended, finfo.min elsewhere."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        scores = scores if mask is None else scores + mask
        if hide is not None:
            scores = torch.where(~hide, scores, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1) @ v


class Sdpa(Attention):
    """torch's own operator with a bool mask that keeps."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        if mask is not None and hide is not None:
            mask = torch.zeros_like(mask).masked_fill(hide, -math.inf) + mask
        elif hide is not None:
            mask = ~hide
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Grouped(Matmul):
    """Two query heads share a key head."""

    kv_heads_divisor = 2


class ThreeTimesScale(Attention):
    """A scale of its own, as peaked as three heads."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        scores = q @ k.transpose(-2, -1) * (3 * self.head_dim**-0.5)
        return _masked(scores, mask, hide).softmax(dim=-1) @ v


class SoftCapped(Attention):
    """tanh on the scores: no scaled dot product attention, and to be left alone."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        scores = 5 * torch.tanh(q @ k.transpose(-2, -1) * self.head_dim**-0.5 / 5)
        return _masked(scores, mask, hide, -1e9).softmax(dim=-1) @ v


class Temperature(Attention):
    """A learnt scale: a tensor, and to be left alone."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__(d_model, num_heads)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        scores = q @ k.transpose(-2, -1) * (self.temperature * self.head_dim**-0.5)
        return _masked(scores, mask, hide, -1e9).softmax(dim=-1) @ v


def _meta(d_model: int, num_heads: int) -> nn.Module:
    from sam3.model.model_misc import MultiheadAttentionWrapper

    return MultiheadAttentionWrapper(num_heads=num_heads, dropout=0.1, embed_dim=d_model, batch_first=True)


STYLES: dict[str, Callable[[int, int], nn.Module]] = {
    "meta": _meta,
    "matmul": Matmul,
    "scale_first": ScaleFirst,
    "scale_split": ScaleSplit,
    "einsum": Einsum,
    "bmm": Bmm,
    "keep_mask": KeepMask,
    "sdpa": Sdpa,
    "grouped": Grouped,
    "three_times_scale": ThreeTimesScale,
    "soft_capped": SoftCapped,
    "temperature": Temperature,
}
"""Meta's first: hypothesis shrinks towards it."""

REFUSED = ("soft_capped", "temperature")
"""What the canonicalizer must leave as it is."""
