"""Emit the masks of an attention as the one mask that canonical attention takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.fx import Node

from sam3x.passes.attention.layout import arrange
from sam3x.passes.graph.aten_nodes import aten, dtype_of, shape_of
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.form import Layout, MaskStep

HALF = (torch.float16, torch.bfloat16)


def combine_masks(
    emit: Emitter, masks: Sequence[tuple[MaskStep, Layout]], wanted: Layout, dtype: torch.dtype
) -> tuple[Node | None, Node | None]:
    """(mask of all steps, rows): bool (True = may attend) when each hides with -inf, otherwise float.

    ``rows``, (…, N, 1) bool or None: where False, finite values fill the whole row and its scores must become zeros.
    """
    if not masks:
        return None, None
    steps = [step for step, _ in masks]
    tensors = [_of_two(emit, arrange(emit, step.tensor, layout, wanted, full=False)) for step, layout in masks]
    fills = {step.fill for step in steps}
    if fills == {-math.inf}:
        return _allowed(emit, steps, tensors), None
    rows = None
    if any(fill is not None and math.isfinite(fill) for fill in fills):
        filling = [(step, tensor) for step, tensor in zip(steps, tensors, strict=True) if step.fill is not None]
        allowed = _allowed(emit, [step for step, _ in filling], [tensor for _, tensor in filling])
        rows = emit(aten.any.dim, allowed, -1, True)
        if len(fills) == 1:
            return emit(aten.logical_or.default, allowed, emit(aten.logical_not.default, rows)), rows
    lowest = torch.finfo(dtype).min
    result: Node | None = None
    for step, tensor in zip(steps, tensors, strict=True):
        if step.fill is None:
            tensor = _narrow(emit, tensor, dtype)
            tensor = tensor if step.factor == 1.0 else emit(aten.mul.Tensor, tensor, step.factor)
            result = tensor if result is None else emit(aten.add.Tensor, result, tensor)
            continue
        filled = _scalar(emit, step.fill if math.isinf(step.fill) else max(step.fill, lowest), dtype, tensor)
        other = result if result is not None else _scalar(emit, 0.0, dtype, tensor)
        keep = _kept(emit, step, tensor) if step.additive else tensor
        inverted = step.inverted or step.additive
        result = emit(aten.where.self, keep, *((other, filled) if inverted else (filled, other)))
    return result, rows


def _of_two(emit: Emitter, mask: Node) -> Node:
    """``mask`` with two dimensions at least, as attention asks of it: (S,) is (1, S)."""
    while len(shape_of(mask)) < 2:
        mask = emit(aten.unsqueeze.default, mask, 0)
    return mask


def _kept(emit: Emitter, step: MaskStep, tensor: Node) -> Node:
    """bool, True where a step that fills lets a query attend."""
    if step.additive:
        return emit(aten.eq.Scalar, tensor, 0.0)
    if step.inverted:
        return tensor
    if tensor.target is aten.logical_not.default and dtype_of(tensor.args[0]) is torch.bool:
        return tensor.args[0]  # type: ignore[return-value]
    return emit(aten.logical_not.default, tensor)


def _allowed(emit: Emitter, steps: Sequence[MaskStep], tensors: Sequence[Node]) -> Node:
    result: Node | None = None
    for step, tensor in zip(steps, tensors, strict=True):
        keep = _kept(emit, step, tensor)
        result = keep if result is None else emit(aten.logical_and.default, result, keep)
    assert result is not None
    return result


def _scalar(emit: Emitter, value: float, dtype: torch.dtype, like: Node) -> Node:
    return emit(aten.full.default, [], value, dtype=dtype, device=like.meta["val"].device)


def _narrow(emit: Emitter, mask: Node, dtype: torch.dtype) -> Node:
    """A float mask in ``dtype``: below its range becomes its lowest number, so no finite mask turns into -inf."""
    have = dtype_of(mask)
    if have.is_floating_point and torch.finfo(have).min < torch.finfo(dtype).min:
        mask = emit(aten.clamp.default, mask, torch.finfo(dtype).min)
    return emit.cast(mask, dtype)
