"""Convolutions as the kernels of a lower precision compute them, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sam3x.verify.products import HALF_BITS, TERMS, TF32_BITS, to_bits

Convolution = Callable[..., Tensor]
"""The arguments of ``aten.convolution``: source (n, c, …), weight, bias, stride, padding, dilation, transposed, …, groups."""


def exact(*args: Any) -> Tensor:
    """Sums in float32, as torch's own."""
    return torch.ops.aten.convolution.default(*args)


def tf32(source: Tensor, weight: Tensor, *how: Any) -> Tensor:
    """Factors rounded to TF32, sums in float32."""
    return exact(to_bits(source, TF32_BITS), to_bits(weight, TF32_BITS), *how)


def half_summed(source: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], *how: Any) -> Tensor:
    """Sums kept in float16, rounded once for some sixteen terms as ``emulated_products.half_summed`` does.

    A depth-wise one adds up a window and no channels; so few terms are left in float32.
    """
    *_, transposed, _, groups = how
    if groups != 1:
        return exact(source, weight, bias, stride, *how)
    channels = source.shape[1]
    # a window that moves by its own width meets each output once
    window = max(1, math.prod(weight.shape[2:]) // (math.prod(stride) if transposed else 1))
    step = max(1, TERMS // window)
    bits = HALF_BITS - round(math.log2(math.sqrt(min(step, channels) * window)))
    sources, factors = source.split(step, 1), weight.split(step, 0 if transposed else 1)
    total = to_bits(exact(sources[0], factors[0], bias, stride, *how), bits)
    for some, factor in zip(sources[1:], factors[1:], strict=True):
        total = to_bits(total.add_(exact(some, factor, None, stride, *how)), bits)
    return total
