"""Emit canonical attention: one plain ``aten.scaled_dot_product_attention`` on (L, N, D), (L, S, D), (L, S, E)."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from sam3x.passes.attention.pattern import Attention, MaskStep
from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import (
    CASTS,
    NOOPS,
    PERMUTES,
    RESHAPES,
    SDPA,
    VIEWS,
    aten,
    dtype_of,
    same_shape,
    same_size,
    shape_of,
)
from sam3x.passes.graph.axes import Axis, Layout, leaves
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.known_numbers import Constant, number_factor

_HALF = (torch.float16, torch.bfloat16)


def rewrite(emit: Emitter, found: Attention, constant: Constant) -> Node:
    """Emit ``found`` as canonical attention and return the node that replaces its output.

    Raises:
        NoMatchError: when a size cannot be named; nothing of it is left in the graph.
    """
    try:
        return _rewrite(emit, found, constant)
    except NoMatchError:
        emit.undo()
        raise


def _rewrite(emit: Emitter, found: Attention, constant: Constant) -> Node:
    lead = _lead(found)
    q, on_q = _unscaled(emit, found.query[0], constant)
    k, on_k = _unscaled(emit, found.key[0], constant)
    scale = found.scale * on_q * on_k
    q = _arrange(emit, q, found.query[1], (*lead, found.queries, found.channels), full=True)
    k = _arrange(emit, k, found.key[1], (*lead, found.keys, found.channels), full=True)
    v = _arrange(emit, found.value[0], found.value[1], (*lead, found.keys, found.value_channels), full=True)
    dtype = torch.promote_types(torch.promote_types(dtype_of(q), dtype_of(k)), dtype_of(v))
    fills = {step.fill for step, _ in found.masks} - {-math.inf}
    if dtype in _HALF and len(fills) > 1:
        dtype = torch.float32  # a finite fill plus a float mask, and the distance of two fills, may not fit a half type
    mask, rows = _combine_masks(emit, found.masks, (*lead, found.queries, found.keys), dtype)
    q, k, v = (emit.cast(node, dtype) for node in (q, k, v))
    if rows is not None:  # scores of zero, from the shorter side where a row is one for all queries
        zero = emit.number(0.0, q)
        if same_size(shape_of(rows)[-2], 1):
            k = emit(aten.where.self, rows, k, zero)
        else:
            q = emit(aten.where.self, rows, q, zero)
    output, layout = found.output
    result = attend(emit, q, k, v, mask, scale)
    result = emit.cast(result, dtype_of(output))
    return _finish(emit, result, output, (*lead, found.queries, found.value_channels), layout)


def _unscaled(emit: Emitter, node: Node, constant: Constant) -> tuple[Node, float]:
    """(x, c) with node = c·x: constant factors found under reshapes, permutes and casts are taken out."""
    factor, kept = 1.0, 0
    moves: list[Node] = []
    below: Any = node
    source: Any = node
    while below.op == "call_function":
        scaled = number_factor(below, constant)
        if scaled is not None and math.isfinite(scaled[1]):
            below, factor = scaled[0], factor * scaled[1]
            source, kept = below, len(moves)
        elif below.target in RESHAPES | PERMUTES | NOOPS or (below.target in CASTS and dtype_of(below).is_floating_point):
            moves.append(below)
            below = below.args[0]
        else:
            break
    for move in reversed(moves[:kept]):
        source = emit(move.target, source, *move.args[1:], **move.kwargs)
    return source, factor


def _lead(found: Attention) -> Layout:
    """Two groups of leading axes: batch and heads, as joined further up in the query where they come as one."""
    axes = tuple(itertools.chain(*found.lead))
    if len(found.lead) == 2:
        return found.lead
    if not axes:
        return ((), ())
    source: Any = found.query[0]
    while source.op == "call_function" and source.target in VIEWS | NOOPS:
        source = source.args[0]
        batch, heads = shape_of(source)[:2] if len(shape_of(source)) == 4 else (1, 1)
        if not same_size(batch, 1) and not same_size(heads, 1) and same_size(batch * heads, axes[0].size):
            axes[0].parts = (Axis(batch), Axis(heads))
            return tuple((part,) for part in axes[0].parts)
    return ((), axes)


def attend(emit: Emitter, q: Node, k: Node, v: Node, mask: Node | None, scale: float) -> Node:
    """The one plain node; kernels take the maximum before the scale, so only a positive scale goes there."""
    if not scale > 0:
        q, scale = emit(aten.mul.Tensor, q, scale), 1.0
    operands = (q, k, v, mask, 0.0, False)
    try:
        return emit(SDPA, *operands, scale=float(scale))
    except GuardOnDataDependentSymNode:  # torch asks whether a size that only a run tells is 1, to broadcast the mask
        shape = (*q.meta["val"].shape[:-1], v.meta["val"].shape[-1])
        return emit.shaped(q, shape, SDPA, *operands, scale=float(scale))


def _finish(emit: Emitter, result: Node, output: Node, have: Layout, wanted: Layout) -> Node:
    """``result`` in the layout of the product it replaces, laid out in memory as that was where a view follows."""
    if _viewed(output):
        result = emit(aten.clone.default, result, memory_format=torch.contiguous_format)
    final = _arrange(emit, result, have, wanted, full=True)
    if not same_shape(shape_of(final), shape_of(output)):
        final = emit.reshape(final, shape_of(output))
    if final is not result and final.target is aten.view.default:
        for user in [user for user in output.users if user.target in VIEWS]:
            returned = any(item.op == "output" for item in user.users)  # its name stands in the signature
            if not returned and same_shape(shape_of(user), shape_of(result)) and final.args[0] is result:
                user.replace_all_uses_with(result)
    return final


def _combine_masks(
    emit: Emitter, masks: Sequence[tuple[MaskStep, Layout]], wanted: Layout, dtype: torch.dtype
) -> tuple[Node | None, Node | None]:
    """(mask of all steps, rows): bool (True = may attend) when each hides with -inf, otherwise float.

    ``rows``, (…, N, 1) bool or None: where False, finite values fill the whole row and its scores must become zeros.
    """
    if not masks:
        return None, None
    steps = [step for step, _ in masks]
    tensors = [_of_two(emit, _arrange(emit, step.tensor, layout, wanted, full=False)) for step, layout in masks]
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
        filled = emit.number(step.fill if math.isinf(step.fill) else max(step.fill, lowest), tensor, dtype)
        other = result if result is not None else emit.number(0.0, tensor, dtype)
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


def _narrow(emit: Emitter, mask: Node, dtype: torch.dtype) -> Node:
    """A float mask in ``dtype``: below its range becomes its lowest number, so no finite mask turns into -inf."""
    have = dtype_of(mask)
    if have.is_floating_point and torch.finfo(have).min < torch.finfo(dtype).min:
        mask = emit(aten.clamp.default, mask, torch.finfo(dtype).min)
    return emit.cast(mask, dtype)


def _arrange(emit: Emitter, node: Node, layout: Layout, wanted: Layout, *, full: bool) -> Node:
    """``node``, dimensions ``layout``, as dimensions ``wanted``; ``full`` expands those it broadcasts over."""
    sizes = shape_of(node)
    layout = tuple(leaves(dim) for dim in layout[len(layout) - len(sizes) :])
    wanted = tuple(leaves(dim) for dim in wanted)
    place = {axis: at for at, axis in enumerate(itertools.chain(*wanted))}
    # whole dimensions first: a permute on top of a permute often cancels, and most layouts need no more
    keys = [-1]
    for dim in layout:
        keys.append(2 * place[dim[0]] if dim else keys[-1] | 1)
    order = sorted(range(len(layout)), key=keys[1:].__getitem__)
    node = emit.permute(node, order)
    layout = tuple(layout[dim] for dim in order)
    groups = [math.prod(axis.size for axis in group) for group in wanted]
    if layout == wanted[len(wanted) - len(layout) :]:
        if not full or same_shape(shape_of(node), groups):
            return node
        same = [-1 if same_size(a, b) else b for a, b in zip(shape_of(node), groups[-len(layout) :], strict=True)]
        return emit(aten.expand.default, node, emit.sizes([*groups[: len(groups) - len(layout)], *same]))
    have = [axis for size, dim in zip(shape_of(node), layout, strict=True) if not same_size(size, 1) for axis in dim]
    target = [axis for axis in place if axis in have]
    grown = [axis for group in wanted if full or set(group) & set(have) for axis in group]
    if have != target or grown != target:
        node = emit.reshape(node, [axis.size for axis in have])
        node = emit.permute(node, [have.index(axis) for axis in target])
    if grown != target:
        node = emit.reshape(node, [axis.size if axis in have else 1 for axis in grown])
        node = emit(aten.expand.default, node, emit.sizes([axis.size for axis in grown]))
    return emit.reshape(node, [size if set(group) & set(grown) else 1 for size, group in zip(groups, wanted, strict=True)])


def release_shapes(module: GraphModule, dying: Sequence[Node]) -> None:
    """Give what only reads the sizes of ``dying`` nodes another source, so that they can go."""
    for node in dying:
        for user in list(node.users):
            emit = Emitter(module, user, dying)
            with contextlib.suppress(NoMatchError):
                if user.target is aten.sym_size.int:
                    user.replace_all_uses_with(emit.size(user.meta["val"]))
                elif user.target is aten.full_like.default and not set(user.users) <= set(dying):
                    like = user.meta["val"]
                    sizes = emit.sizes(shape_of(user))
                    new = emit(aten.full.default, sizes, user.args[1], dtype=like.dtype, device=like.device)
                    user.replace_all_uses_with(new)


def _viewed(node: Node) -> bool:
    """Whether a view depends on the memory layout of ``node``, directly or through permutes."""
    return any(
        user.target in VIEWS or (user.target in PERMUTES | {aten.alias.default, aten.detach.default} and _viewed(user))
        for user in node.users
    )


def explicit_causal(emit: Emitter, queries: Any, keys: Any, device: torch.device) -> Node:
    """(N, S) bool, True where key ≤ query: what ``is_causal`` means to torch, for any N and S."""
    rows = emit(aten.arange.default, emit.size(queries), device=device, pin_memory=False)
    columns = emit(aten.arange.default, emit.size(keys), device=device, pin_memory=False)
    return emit(aten.le.Tensor, columns, emit(aten.unsqueeze.default, rows, -1))


def repeat_heads(emit: Emitter, node: Node, heads: int) -> Node:
    """(…, G, S, D) to (…, heads, S, D): each head repeated heads/G times in a row."""
    *outer, groups, length, width = shape_of(node)
    if same_size(groups, heads):
        return node
    node = emit(aten.unsqueeze.default, node, -3)
    node = emit(aten.expand.default, node, emit.sizes([*outer, groups, heads // operator.index(groups), length, width]))
    shape = [*outer, heads, length, width]
    return emit.shaped(node, shape, aten.reshape.default, node, emit.sizes(shape))
