"""Eager float32 with the rounding of a lower precision: how far an artifact of that precision may be, at best."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sam3x.verify.convolutions as convolutions
import sam3x.verify.products as products
from sam3x.passes.precision.autocast import worth_int8
from sam3x.verify.convolutions import Convolution
from sam3x.verify.products import Product, attention

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}
"""Operators that are one product; before its factors some have what the sum begins with."""

_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
_LINEAR = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2)}
"""What ``linear`` becomes: positions of the activations and of the transposed weight."""


@contextlib.contextmanager
def eager_in(
    precision: str, *, half_sums: bool = False, row_scales: bool = True, int8_convolutions: bool = False
) -> Iterator[None]:
    """Within it, torch's own float32 operators round as ``tf32``, ``fp16``, ``bf16`` or ``int8`` would; sums stay float32.

    ``fp16``, ``bf16``: weights and every result, those inside attention too. ``tf32``: the factors of products and
    convolutions. ``int8``: the operands of ``linear``, weights with a symmetric scale a row, activations with a scale and zero
    point (Jacob et al., 2018).

    Args:
        row_scales: of ``int8``: each row of activations has a scale of its own, or the whole tensor has one.
        int8_convolutions: of ``int8``: of convolutions what goes in, weights and what comes out, too.
        half_sums: of ``fp16``: sums of products and convolutions are kept in float16 (``half_summed`` of each).
    """
    fast, threads = torch.backends.mha.get_fastpath_enabled(), torch.get_num_threads()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator, in which nothing could be rounded
    if half_sums:
        torch.set_num_threads(1)  # its steps are too small to share: threads would wait for each other
    try:
        with _Int8(row_scales, int8_convolutions) if precision == "int8" else _mode(precision, half_sums):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.mha.set_fastpath_enabled(fast)


def _mode(precision: str, half_sums: bool) -> TorchDispatchMode:
    kernels: tuple[Product, Convolution]
    if precision == "tf32":
        return _Rounding(None, products.tf32, convolutions.tf32)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    kernels = (products.half_summed, convolutions.half_summed) if half_sums else (products.exact, convolutions.exact)
    return _Rounding(functools.partial(_through, dtype), *kernels, torch.finfo(dtype).max)


def _through(dtype: torch.dtype, value: Tensor) -> Tensor:
    """float32 rounded to ``dtype``; what is too large for it keeps as many bits and stays finite.

    An artifact may hold it in float32 (``--fp32-ops``); one that overflows is infinite or undefined, which nothing excuses.
    """
    rounded = value.to(dtype).float()
    beyond = rounded.isinf()
    if not bool(beyond.any()):
        return rounded
    beyond &= value.isfinite()
    step = 2.0**20  # so that the splitting does not overflow
    return torch.where(beyond, products.to_bits(value / step, products.HALF_BITS) * step, rounded)


def _is_beyond(value: Any, largest: float) -> bool:
    """Whether an operand is one finite number above ``largest`` or below its negative."""
    number = float(value) if isinstance(value, Tensor) and value.dim() == 0 and value.dtype is torch.float32 else value
    return isinstance(number, float) and math.isfinite(number) and abs(number) > largest


class _Rounding(TorchDispatchMode):
    """Results go through ``rounded`` (None: stay as they are), products are ``product``, convolutions ``convolution``.

    ``largest``: of the precision, to which a fill with a larger number is clamped.
    """

    def __init__(
        self, rounded: Callable[[Tensor], Tensor] | None, product: Product, convolution: Convolution, largest: float = math.inf
    ) -> None:
        super().__init__()
        self.largest = largest
        self.rounded, self.product, self.convolution = rounded, product, convolution

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        single = bool(args) and isinstance(args[0], Tensor) and args[0].dtype is torch.float32
        if single and func in _PRODUCTS:
            return self._round(self._product(args, **(kwargs or {})))
        if single and func is aten.convolution.default:
            factors = [None if item is None else self._round(item) for item in args[:3]]  # weights come as they are
            return self._round(self.convolution(*factors, *args[3:]))
        if single and func is _ATTENTION:
            return self._attention(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        fresh = not any(item.alias_info is not None for item in func._schema.returns)
        filled = self.rounded is not None and any(_is_beyond(item, self.largest) for item in args)
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if self.rounded is not None and fresh and isinstance(item, Tensor) and item.dtype is torch.float32:
                # a fill, or a sum or product with one, that overflows is the precision's lowest, as passes write it
                near = torch.where(item.isinf(), item, item.clamp(-self.largest, self.largest)) if filled else item
                item.copy_(self._round(near))
        return result

    def _round(self, value: Tensor) -> Tensor:
        return value if self.rounded is None else self.rounded(value)

    def _product(self, args: Any, beta: float = 1, alpha: float = 1) -> Tensor:
        *start, left, right = map(self._round, args)  # weights come as they are
        return self.product(left * alpha, right, *(item * beta for item in start))

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        mask, scale = kwargs.get("attn_mask"), kwargs.get("scale")
        if is_causal:
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        result = attention(query, key, value, mask, scale, self._round, self.product)
        return self._round(result), query.new_zeros(query.shape[:-1])  # nobody asks for the logsumexp


class _Int8(TorchDispatchMode):
    def __init__(self, row_scales: bool, convolutions: bool) -> None:
        super().__init__()
        self.row_scales, self.convolutions = row_scales, convolutions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LINEAR:
            rows, weight = _LINEAR[func]
            if worth_int8(args[weight].shape[::-1]):
                args = list(args)
                args[rows], args[weight] = activations_int8(args[rows], self.row_scales), columns_int8(args[weight])
        if self.convolutions and func is aten.convolution.default and convolves_int8(*args):
            return convolution_int8(*args)
        return func(*args, **(kwargs or {}))


def convolves_int8(x: Tensor, weight: Tensor, *how: Any) -> bool:
    """Tell whether int8 takes an ``aten.convolution`` of these arguments: its weight is large and it is not transposed."""
    transposed = how[4]
    return not transposed and worth_int8(weight.shape)


def convolution_int8(x: Tensor, weight: Tensor, *how: Any) -> Tensor:
    """``aten.convolution`` with what goes in, weights (a scale for each output channel) and what comes out through 8 bits."""
    rounded = columns_int8(weight.flatten(1).t()).t().reshape(weight.shape)
    return activations_int8(convolutions.exact(activations_int8(x, False), rounded, *how), False)


def activations_int8(value: Tensor, row_scales: bool) -> Tensor:
    """(…, in) through 8 bits, with a scale and zero point for each row or for all of it."""
    low, high = (value.amin(-1, True), value.amax(-1, True)) if row_scales else (value.min(), value.max())
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-128 - low / scale).round()
    return ((value / scale).round().add_(zero).clamp_(-128, 127) - zero) * scale


def columns_int8(weight: Tensor) -> Tensor:
    """(in, out) through int8 with a symmetric scale for each column."""
    scale = (weight.abs().amax(0, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale).round() * scale
