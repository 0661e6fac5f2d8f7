"""Eager float32 with the rounding of a lower precision: how far an artifact of that precision may be, at best."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2)}
"""What ``linear`` becomes: positions of the activations and of the transposed weight."""


@contextlib.contextmanager
def eager_in(precision: str) -> Iterator[None]:
    """Within it, torch's own float32 operators round as ``fp16``, ``bf16`` or ``int8`` would; sums stay float32.

    ``fp16``, ``bf16``: weights and every result. ``int8``: the operands of ``linear``, weights with a symmetric scale a row,
    activations with a scale and zero point for each row (Jacob et al., 2018).
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator, in which nothing could be rounded
    try:
        with _Int8() if precision == "int8" else _Half(torch.bfloat16 if precision == "bf16" else torch.float16):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Half(TorchDispatchMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            args = tuple(self._round(item) if isinstance(item, Tensor) else item for item in args)
        result = func(*args, **(kwargs or {}))
        fresh = not any(item.alias_info is not None for item in func._schema.returns)
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if fresh and isinstance(item, Tensor) and item.dtype is torch.float32:
                item.copy_(item.to(self.dtype))
        return result

    def _round(self, value: Tensor) -> Tensor:
        return value.to(self.dtype).float() if value.dtype is torch.float32 else value


class _Int8(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            rows, weight = _PRODUCTS[func]
            args = list(args)
            args[rows], args[weight] = _rows_int8(args[rows]), _columns_int8(args[weight])
        return func(*args, **(kwargs or {}))


def _rows_int8(value: Tensor) -> Tensor:
    low, high = value.amin(-1, keepdim=True).clamp(max=0), value.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-128 - low / scale).round()
    return ((value / scale).round().add_(zero).clamp_(-128, 127) - zero) * scale


def _columns_int8(weight: Tensor) -> Tensor:
    scale = (weight.abs().amax(0, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale).round() * scale
