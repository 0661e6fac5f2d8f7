"""Products, and the attention made of them, as the kernels of a lower precision compute them, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[..., Tensor]
"""``(left, right, start=None)`` → ``start + left @ right``: left (…, m, k), right (…, k, n), start broadcast to (…, m, n)."""

TERMS = 16
"""Terms added in float32 before a sum kept in float16 is rounded."""

HALF_BITS, TF32_BITS = 11, 11
"""Significand of float16 and of TF32, the implied bit counted."""

_BLOCK = 1 << 16
"""Elements of a sum worked on at once, so that they stay in a core's cache."""

_ROWS = 512
"""Queries whose scores are in memory at once."""


def exact(left: Tensor, right: Tensor, start: Tensor | None = None) -> Tensor:
    """Sums in float32, as torch's own."""
    total = left @ right
    return total if start is None else total.add_(start)


def tf32(left: Tensor, right: Tensor, start: Tensor | None = None) -> Tensor:
    """Operands rounded to TF32, sums in float32: tensor cores on float32 (decision 0010 has an H200's distance)."""
    return exact(to_bits(left, TF32_BITS), to_bits(right, TF32_BITS), start)


def half_summed(left: Tensor, right: Tensor, start: Tensor | None = None) -> Tensor:
    """Sums kept in float16, as on Arm and on x86 with ``avx512_fp16``.

    A kernel rounds after each term; here it is after every sixteenth, to two bits less, which is off by as much (rounding
    errors are independent, so those of n terms are √n of one) and needs a sixteenth of the passes over the result.
    """
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    shape = (*batch, left.shape[-2], right.shape[-1])
    if start is not None and bool(start.isinf().any()):  # a mask: rounding would make it NaN
        return torch.where(start.isinf(), start, half_summed(left, right, start.masked_fill(start.isinf(), 0.0)))
    total = left.new_zeros(shape) if start is None else start.expand(shape).clone()
    rows = max(1, _BLOCK // max(1, shape[-1]))
    lefts, rights, totals = (
        value.expand(*batch, *value.shape[-2:]).reshape(-1, *value.shape[-2:]) for value in (left, right, total)
    )
    for block_of, factor, whole in zip(totals, lefts, rights, strict=True):
        for first in range(0, shape[-2], rows):
            _half_sum(block_of[first : first + rows], factor[first : first + rows], whole)
    return total


def _half_sum(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``total`` in place."""
    bits = HALF_BITS - round(math.log2(math.sqrt(TERMS)))
    head, tail = torch.empty_like(total), torch.empty_like(total)
    for first in range(0, left.shape[-1], TERMS):
        total.addmm_(left[:, first : first + TERMS], right[first : first + TERMS])
        torch.mul(total, 2.0 ** (24 - bits) + 1, out=head)  # to_bits, in place
        torch.sub(head, total, out=tail)
        torch.sub(head, tail, out=total)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    rounded: Callable[[Tensor], Tensor],
    product: Product,
) -> Tensor:
    """Scaled dot-product attention of two products; the scaled query, scores and weights are ``rounded`` between them.

    Args:
        query: (…, l, e). key: (…, s, e). value: (…, s, v).
        mask: float (added) or bool (True takes part), broadcast to (…, l, s).
    """
    tiles = []
    for first in range(0, query.shape[-2], _ROWS):
        rows = slice(first, first + _ROWS)
        scores = rounded(product(rounded(query[..., rows, :] * scale), key.transpose(-2, -1)))
        if mask is not None:
            part = mask[..., rows, :] if mask.shape[-2] > 1 else mask
            scores = scores.masked_fill(~part, -math.inf) if part.dtype is torch.bool else rounded(scores + part)
        weights = torch.ops.aten._safe_softmax(scores, -1)  # zeros where nothing may be attended, as torch's own attention
        tiles.append(product(rounded(weights), value))
    return torch.cat(tiles, -2)


def to_bits(value: Tensor, bits: int) -> Tensor:
    """``value`` rounded to a significand of ``bits`` bits (Veltkamp's splitting, 1968)."""
    head = value * (2.0 ** (24 - bits) + 1)
    return head - (head - value)
