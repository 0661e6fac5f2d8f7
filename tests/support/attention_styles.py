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
            k, v = self.repeated(k), self.repeated(v)
        hide = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        mask = None
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            hide = attn_mask if hide is None else hide | attn_mask
        elif attn_mask is not None:
            mask = attn_mask
        joined = self.attend(q, k, v, mask, hide).transpose(1, 2)
        return self.out_proj(joined.reshape(joined.shape[0], joined.shape[1], -1)), None

    def repeated(self, x: Tensor) -> Tensor:
        """(B, kv_heads, S, D) → (B, H, S, D), or as ``attend`` takes it."""
        return x.repeat_interleave(self.num_heads // self.kv_heads, dim=1)

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


class GroupedByExpand(Matmul):
    """Two query heads share a key head, which a view repeats."""

    kv_heads_divisor = 2

    def repeated(self, x: Tensor) -> Tensor:
        b, heads, s, d = x.shape
        return x[:, :, None].expand(b, heads, self.num_heads // heads, s, d).reshape(b, self.num_heads, s, d)


class GroupedByGroups(Attention):
    """Two query heads share a key head: a dimension for groups, and keys that broadcast over it."""

    kv_heads_divisor = 2

    def repeated(self, x: Tensor) -> Tensor:
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        b, _, n, d = q.shape
        groups = q.reshape(b, self.kv_heads, -1, n, d)
        scores = groups @ k[:, :, None].transpose(-2, -1) * d**-0.5
        mask, hide = (m[:, None] if m is not None and m.dim() == 4 else m for m in (mask, hide))
        weights = _masked(scores, mask, hide, -1e9).softmax(dim=-1)
        return (weights @ v[:, :, None]).reshape(b, self.num_heads, n, d)


class EnableGqa(Attention):
    """torch's own operator, which repeats the key heads."""

    kv_heads_divisor = 2

    def repeated(self, x: Tensor) -> Tensor:
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        if mask is not None and hide is not None:
            mask = mask.masked_fill(hide, -math.inf)
        elif hide is not None:
            mask = ~hide
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class SingleSoftmax(Attention):
    """Weights in float32, whatever the scores are."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        scores = _masked(q @ k.transpose(-2, -1) * self.head_dim**-0.5, mask, hide)
        return scores.softmax(dim=-1, dtype=torch.float32) @ v


class SingleScores(Attention):
    """Queries and scores in float32, the result as the queries were; the lowest float32 hides."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        scores = (q.float() @ k.float().transpose(-2, -1)) * self.head_dim**-0.5
        scores = _masked(scores, mask, hide, torch.finfo(torch.float32).min)
        return (scores.to(torch.float32).softmax(-1) @ v.to(torch.float32)).type_as(q)


class Biased(Attention):
    """A bias of one dimension: later keys count for more."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5 + torch.arange(k.shape[2]) * 0.03
        return _masked(scores, mask, hide).softmax(dim=-1) @ v


class BiasedByHead(Attention):
    """ALiBi: a slope a head times the distance of query and key."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        slopes = 2.0 ** -torch.arange(1, self.num_heads + 1)[:, None, None]
        bias = -slopes * (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])).abs() * 0.1
        return _masked(q @ k.transpose(-2, -1) * self.head_dim**-0.5 + bias, mask, hide).softmax(dim=-1) @ v


class NoAutocast(Matmul):
    """What people write to keep attention in float32; and an autocast of a device that is not there."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", dtype=torch.float16):
            return super().attend(q.float(), k.float(), v.float(), mask, hide)


class Autocast(Matmul):
    """Attention below float32, which an export refuses."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().attend(q, k, v, mask, hide).type_as(q)


LONGEST = 64
"""Positions that tables of angles hold."""


class Rotary(Matmul):
    """Pairs of channels turned by an angle that grows with the position; angles as they are needed. An odd channel stays."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__(d_model, num_heads)
        pairs = self.head_dim // 2
        self.register_buffer("rates", 100.0 ** -(torch.arange(pairs) / max(pairs, 1)), persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        if self.head_dim > 1:
            q, k = self.turned_in_part(q), self.turned_in_part(k)
        return super().attend(q, k, v, mask, hide)

    def turned_in_part(self, x: Tensor) -> Tensor:
        even = 2 * (self.head_dim // 2)
        turned = self.turned(x[..., :even].contiguous())
        return turned if even == self.head_dim else torch.cat((turned, x[..., even:]), dim=-1)

    def angles(self, length: int) -> Tensor:
        return torch.arange(length)[:, None] * self.rates

    def turned(self, x: Tensor) -> Tensor:
        """(B, H, N, an even number) → the same."""
        angles = self.angles(x.shape[2])
        left, right = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class RotarySliced(Rotary):
    """Tables of cosines and sines, as many rows of them as there are positions; pairs stand side by side."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__(d_model, num_heads)
        angles = self.angles(LONGEST)
        self.register_buffer("cos", angles.cos().repeat_interleave(2, dim=-1))
        self.register_buffer("sin", angles.sin().repeat_interleave(2, dim=-1), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        n = x.shape[2]
        other = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * self.cos[:n] + other * self.sin[:n]


class RotaryComplex(Rotary):
    """Upstream's: a complex table, its first rows."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__(d_model, num_heads)
        angles = self.angles(LONGEST)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))

    def table(self, length: int) -> Tensor:
        return self.freqs_cis[:length]

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.table(x.shape[2])).flatten(3).type_as(x)


class RotaryPolar(RotaryComplex):
    """A complex table that is made as it runs."""

    def table(self, length: int) -> Tensor:
        angles = torch.outer(torch.arange(length, dtype=torch.float32), self.rates)
        return torch.polar(torch.ones_like(angles), angles)


class RotaryViewed(RotaryComplex):
    """A real table of pairs, a complex view of its first rows."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__(d_model, num_heads)
        self.register_buffer("pairs", torch.view_as_real(self.freqs_cis).clone())

    def table(self, length: int) -> Tensor:
        return torch.view_as_complex(self.pairs[:length])


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
    "grouped_by_expand": GroupedByExpand,
    "grouped_by_groups": GroupedByGroups,
    "enable_gqa": EnableGqa,
    "single_softmax": SingleSoftmax,
    "single_scores": SingleScores,
    "no_autocast": NoAutocast,
    "biased": Biased,
    "biased_by_head": BiasedByHead,
    "rotary": Rotary,
    "rotary_sliced": RotarySliced,
    "rotary_complex": RotaryComplex,
    "rotary_polar": RotaryPolar,
    "rotary_viewed": RotaryViewed,
    "autocast": Autocast,
}
"""Meta's first: hypothesis shrinks towards it."""

REFUSED = ("soft_capped", "temperature")
"""What the canonicalizer must leave as it is."""

ORDERED = ("biased", "biased_by_head", "rotary", "rotary_sliced", "rotary_complex", "rotary_polar", "rotary_viewed")
"""Where the order of the keys means something."""

BELOW_FLOAT32 = ("autocast",)
"""What a capture must refuse by its line."""
