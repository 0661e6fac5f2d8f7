"""Emit the masks of an attention as the one mask that canonical attention takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.fx import Node

from sam3x.passes.attention.layout import arrange
from sam3x.passes.graph.aten_nodes import aten, dtype_of
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
    tensors = [arrange(emit, step.tensor, layout, wanted, full=False) for step, layout in masks]
    finite = [at for at, step in enumerate(steps) if step.fill is not None and math.isfinite(step.fill)]
    if all(step.fill == -math.inf for step in steps):
        return _allowed(emit, steps, tensors), None
    # one value that nothing is added to: the lowest number swallows the scores, so a filled row stays uniform
    after = steps[finite[0] :] if finite else steps
    swallow = dtype not in HALF and len({steps[at].fill for at in finite}) == 1 and all(s.fill is not None for s in after)
    rows = None
    if finite and not swallow:
        filling = [(step, tensor) for step, tensor in zip(steps, tensors, strict=True) if step.fill is not None]
        allowed = _allowed(emit, [step for step, _ in filling], [tensor for _, tensor in filling])
        rows = emit(aten.any.dim, allowed, -1, True)
        if len(finite) == len(steps) and len({step.fill for step in steps}) == 1:
            return emit(aten.logical_or.default, allowed, emit(aten.logical_not.default, rows)), rows
    lowest = torch.finfo(dtype).min
    result: Node | None = None
    for step, tensor in zip(steps, tensors, strict=True):
        if step.fill is None:
            tensor = _narrow(emit, tensor, dtype)
            tensor = tensor if step.factor == 1.0 else emit(aten.mul.Tensor, tensor, step.factor)
            result = tensor if result is None else emit(aten.add.Tensor, result, tensor)
            continue
        fill = step.fill if math.isinf(step.fill) else lowest if swallow else max(step.fill, lowest)
        filled = _scalar(emit, fill, dtype, tensor)
        other = result if result is not None else _scalar(emit, 0.0, dtype, tensor)
        result = emit(aten.where.self, tensor, *((other, filled) if step.inverted else (filled, other)))
    return result, rows


def _allowed(emit: Emitter, steps: Sequence[MaskStep], tensors: Sequence[Node]) -> Node:
    result: Node | None = None
    for step, tensor in zip(steps, tensors, strict=True):
        if step.inverted:
            keep = tensor
        elif tensor.target is aten.logical_not.default and dtype_of(tensor.args[0]) is torch.bool:  # type: ignore[arg-type]
            keep = tensor.args[0]  # type: ignore[assignment]
        else:
            keep = emit(aten.logical_not.default, tensor)
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
