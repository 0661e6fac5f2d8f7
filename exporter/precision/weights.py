"""Weights rounded to a lower precision before anything is captured; activations and arithmetic stay float32 (decision 0015).

What is rounded is seen and not guessed: the module runs once in eager, and every parameter that reaches a product, a
convolution or a lookup is rounded by its output channel, however the module reshaped it on the way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SMALLEST = 256
"""Elements of a weight worth rounding, and rows of a table: below, scales and conversions take what is saved."""

LARGEST_INT8 = 127

Rounded = Mapping[int, nn.Parameter]
"""``id`` of a parameter → what stands for it."""

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2), aten.bmm.default: (0, 1), aten.baddbmm.default: (1, 2)}
"""Positions of both operands; the right one is the weight where both are parameters."""


def rounded_weights(trees: Iterable[nn.Module], precision: str, run: Callable[[], Any]) -> Rounded:
    """What stands for each weight of ``trees`` that ``run`` multiplies, convolves or looks up with.

    ``fp16``: rounded to float16; one that reaches beyond its range is left out. ``int8``: whole multiples, −127 to 127, of one
    scale an output channel, which has 16 bits, so that scale times number is exact in float32. All values are float32.

    Args:
        run: runs the trees in eager, without gradients. precision: ``fp16`` or ``int8``.
    """
    watch = _Watch([item for tree in trees for item in tree.parameters()])
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator, in which nothing can be seen
    try:
        with watch:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    made = {}
    for parameter, axis in watch.found.values():
        value = parameter.detach()
        value = value.to(torch.float16).to(torch.float32) if precision == "fp16" else int8_channels(value, axis)
        if bool(value.isfinite().all()):
            made[id(parameter)] = nn.Parameter(value, requires_grad=False)
    return made


def int8_channels(value: Tensor, axis: int) -> Tensor:
    """float32 → float32 of the same shape, each slice of dimension ``axis`` at most 255 values, scale · (−127 … 127)."""
    largest = value.abs().amax([dim for dim in range(value.dim()) if dim != axis], keepdim=True)
    scale = torch.where(largest > 0, largest / LARGEST_INT8, torch.ones_like(largest))
    bits = scale.view(torch.int32)
    scale = ((bits + 0xFF) & ~0xFF).view(torch.float32)  # up to 16 bits: the largest is still 127 times the scale
    return (value / scale).round().clamp(-LARGEST_INT8, LARGEST_INT8) * scale


@contextlib.contextmanager
def swapped(trees: Iterable[nn.Module], weights: Rounded) -> Iterator[None]:
    """Within it the modules of ``trees``, sam3x's own and never the user's, hold ``weights``."""
    before = _swap(trees, weights)
    try:
        yield
    finally:
        for held, name, parameter in before:
            held[name] = parameter


def _swap(trees: Iterable[nn.Module], weights: Rounded) -> list[tuple[dict[str, Any], str, nn.Parameter]]:
    changed = []
    for tree in trees:
        for module in tree.modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in weights:
                    changed.append((module._parameters, name, parameter))
    for held, name, parameter in changed:
        held[name] = weights[id(parameter)]
    return changed  # type: ignore[return-value]


class _Watch(TorchDispatchMode):
    """``found``: id of a parameter → itself and the dimension that holds its output channels."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.found: dict[int, tuple[nn.Parameter, int]] = {}
        self._owners: dict[int, list[nn.Parameter]] = {}
        for item in {id(item): item for item in parameters}.values():
            if item.dim() > 1 and item.numel() >= SMALLEST and item.dtype is torch.float32:
                self._owners.setdefault(item.untyped_storage().data_ptr(), []).append(item)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            left, right = (args[position] for position in _PRODUCTS[func])
            if not self._note(right, -1):
                self._note(left, -2)
        elif func is aten.convolution.default:
            self._note(args[1], 1 if args[6] else 0)
        elif func is aten.embedding.default and args[0].shape[0] >= SMALLEST:
            self._note(args[0], 0)
        return func(*args, **(kwargs or {}))

    def _note(self, operand: Tensor, dim: int) -> bool:
        """Whether ``operand`` is a parameter, or a part of one seen another way; its ``dim`` are the output channels."""
        owner = self._owner(operand)
        if owner is None:
            return False
        strides = [size > 1 and stride == operand.stride(dim) for size, stride in zip(owner.shape, owner.stride(), strict=True)]
        if True in strides:
            self.found.setdefault(id(owner), (owner, strides.index(True)))
        return True

    def _owner(self, operand: Tensor) -> nn.Parameter | None:
        start = operand.data_ptr()
        for item in self._owners.get(operand.untyped_storage().data_ptr(), ()):
            if item.data_ptr() <= start < item.data_ptr() + _extent(item):
                return item
        return None


def _extent(value: Tensor) -> int:
    """Bytes from its first element to past its last."""
    return (1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))) * value.itemsize
