"""Trace one layer of each kind once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from sam3x.fusion.shadow import attributes_kept

LayerCall = Callable[..., Tensor]

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTemplate:
    """One traced layer.

    Attributes:
        program: its inputs are those of the operator it replaces, in the same order.
        weights: each name of each of the layer's parameters and buffers → its position in the operator's ``weights``.
    """

    program: ExportedProgram
    weights: Mapping[str, int]


class _OneLayer(nn.Module):
    def __init__(self, layer: nn.Module, call: LayerCall) -> None:
        super().__init__()
        self.layer = layer
        self._call = call

    def forward(self, *tensors: Tensor) -> Tensor:
        with attributes_kept(self.layer):
            return self._call(*tensors)


def weights_of(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those registered under two names once."""
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def _positions(layer: nn.Module) -> dict[str, int]:
    """Every name of a parameter or buffer → where it stands in ``weights_of``; torch.export may use any of them."""
    order = {id(value): position for position, value in enumerate(weights_of(layer).values())}
    named = (*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False))
    return {name: order[id(value)] for name, value in named}


def kind_of(layer: nn.Module, signature: Sequence[object]) -> str:
    """Equal for layers that one trace can stand for: the same classes, plain attributes, tensor shapes and call ``signature``.

    ``layer_idx`` of the layer itself is left out, so this must only be asked of layers known not to read it (``is_stock``).
    """
    parts: list[object] = [*signature]
    for path, module in layer.named_modules():
        parts.append((path, type(module).__module__, type(module).__qualname__))
        for name, value in sorted(module.__dict__.items()):
            if name in ("_parameters", "_buffers", "_modules") or (path == "" and name == "layer_idx"):
                continue
            # what is no plain value may hold anything: alike only when it is the same object
            parts.append((path, name, repr(value) if isinstance(value, _PLAIN) else _identity(value)))
    by_tensor: dict[int, str] = {}
    for name, tensor in (*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)):
        first = by_tensor.setdefault(id(tensor), name)
        parts.append((name, first, tuple(tensor.shape), tensor.dtype, tensor.stride()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _identity(value: Any) -> object:
    if isinstance(value, (tuple, list)) and all(isinstance(item, _PLAIN) for item in value):
        return repr(value)
    if isinstance(value, (set, frozenset, dict)) and not value:
        return type(value).__name__
    return id(value)


def trace_template(
    layer: nn.Module,
    calls: Sequence[LayerCall],
    operands: Sequence[Operand],
    decomposed: Callable[[ExportedProgram], ExportedProgram],
) -> LayerTemplate:
    """Export and decompose one layer.

    Args:
        layer: owner of the weights.
        calls: ways to run it, the preferred one first; the next is tried where one needs to know a size that depends on a flag.
        operands: what the operator takes as ``inputs`` in the encoder's graph.
        decomposed: gives a program in core ATen.
    """
    example, dynamic = zip(*(operand.example() for operand in operands), strict=True)
    for position, call in enumerate(calls):
        try:
            program = torch.export.export(_OneLayer(layer, call), example, dynamic_shapes=(dynamic,), strict=False)
            return LayerTemplate(program=decomposed(program), weights=_positions(layer))
        except GuardOnDataDependentSymNode:
            if position + 1 == len(calls):
                raise
    raise ValueError("no way to call the layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """One input of a layer, ``value`` as the encoder's graph knows it.

    ``freed`` maps dimensions that are fixed there and halved by a runtime flag to the size to trace them at: half of a
    fixed 2 is 1, and a size that is 1 or 2 by a flag would be taken for 2.
    """

    value: Tensor
    freed: Mapping[int, int]

    def example(self) -> tuple[Tensor, dict[int, Any] | None]:
        shape, dims = [], {}
        for index, size in enumerate(self.value.shape):
            if isinstance(size, torch.SymInt) or index in self.freed:
                dims[index] = Dim.DYNAMIC
            shape.append(size.node.hint if isinstance(size, torch.SymInt) else self.freed.get(index, size))
        return torch.zeros(shape, dtype=self.value.dtype), dims or None
