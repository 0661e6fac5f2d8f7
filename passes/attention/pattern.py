"""Recognise hand-written attention around a softmax, from shapes and constants instead of op order.

Every dimension of the first product is an ``Axis`` that is followed by identity, not by size, through reshapes and permutes
to the second product: L (any leading ones), N queries, S keys. D are the channels of q and k, E those of v.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import (
    CASTS,
    NOOPS,
    PERMUTES,
    RESHAPES,
    aten,
    dtype_of,
    permutation,
    same_shape,
    same_size,
    shape_of,
)
from sam3x.passes.graph.axes import Axis, Layout, axes_of, leaves
from sam3x.passes.graph.known_numbers import Constant, number_factor

PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default}
ASSERTIONS = {aten._assert_tensor_metadata.default}
SIZE_READERS = {aten.sym_size.int, aten.full_like.default}
MASKED_AT_MOST = -1e4
ABSORBS = -1e30
"""Float32 loses what is added to a number at or below it: a score is never near 10²²."""


@dataclass(frozen=True, slots=True)
class MaskStep:
    """One mask on the scores: ``tensor · factor`` added, or (``fill`` given) ``tensor`` bool with True, or False where
    ``inverted``, for positions that get ``fill``. ``at`` is the node that applies it: ``tensor`` broadcasts to its shape.

    ``additive``: ``tensor`` is a float that is added, 0 or a number so low that ``fill`` is all that is left of the sum."""

    tensor: Node
    at: Node
    factor: float = 1.0
    fill: float | None = None
    inverted: bool = False
    additive: bool = False


@dataclass(frozen=True, slots=True)
class Scores:
    """What the softmax is taken of: ``scale · first @ second``, then ``masks`` in the order of application.

    ``chain``: the nodes from the product to the softmax's input."""

    first: Node
    second: Node
    product: Node
    scale: float
    masks: tuple[MaskStep, ...]
    chain: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Attention:
    """``softmax(scale · q @ kᵀ + masks) @ v``, each operand as (node, layout); ``output`` likewise, to be replaced.

    ``lead``: the groups of axes that become the leading dimensions, two at most.
    ``dead``: the nodes that nothing needs once ``output`` is replaced.
    """

    query: tuple[Node, Layout]
    key: tuple[Node, Layout]
    value: tuple[Node, Layout]
    output: tuple[Node, Layout]
    lead: Layout
    queries: tuple[Axis, ...]
    keys: tuple[Axis, ...]
    channels: tuple[Axis, ...]
    value_channels: tuple[Axis, ...]
    scale: float
    masks: tuple[tuple[MaskStep, Layout], ...]
    dead: tuple[Node, ...] = ()


def match(softmax: Node, constant: Constant) -> Attention:
    """Match the attention whose softmax is ``softmax``.

    Raises:
        NoMatchError: with the reason, when it is not attention or cannot be proved to be.
    """
    rank = len(shape_of(softmax))
    if rank < 2:
        raise NoMatchError("the softmax has no query dimension")
    scores = _walk(softmax.args[0], softmax, constant, 1.0, 0)
    factors = (scores.scale, *(mask.factor for mask in scores.masks))
    if not all(math.isfinite(factor) for factor in factors):
        raise NoMatchError("the scale is not finite")
    forward, output = _forward(softmax)
    made: Layout = tuple(axes_of(size) for size in shape_of(scores.product))
    layouts = {scores.product: made}
    for before, node in zip((*scores.chain, *forward[:-1]), (*scores.chain[1:], *forward), strict=True):
        layouts[node] = _moved(node, layouts[before])
    over = leaves(layouts[softmax][operator.index(softmax.args[1]) % rank])
    rows, columns = leaves(made[-2]), leaves(made[-1])
    if over not in (rows, columns):
        raise NoMatchError(f"the softmax is over dimension {softmax.args[1]}, not the keys' dimension of the product")
    swapped = over != columns  # k @ qᵀ
    queries, keys = (columns, rows) if swapped else (rows, columns)
    contracted_last = output.args[0] is forward[-1]
    if output.args[0] is output.args[1]:
        raise NoMatchError("the probabilities are multiplied by themselves")
    value = output.args[1 if contracted_last else 0]
    if not isinstance(value, Node) or len(shape_of(value)) < 2:
        raise NoMatchError("the value is a vector")
    *outer, second_last, last = (leaves(dim) for dim in layouts[forward[-1]])
    contracted, kept = (last, second_last) if contracted_last else (second_last, last)
    if contracted != keys:
        raise NoMatchError("the product with the value contracts a dimension that is not the softmax's")
    lead = tuple(leaves(dim) for dim in made[:-2])
    if kept != queries or set(leaves(sum(outer, ()))) != set(leaves(sum(lead, ()))):
        raise NoMatchError("the scores change their query dimension between product and softmax")
    if not same_shape(shape_of(output)[:-2], shape_of(forward[-1])[:-2]):
        raise NoMatchError("the value has more leading dimensions than the scores")
    channels = axes_of(shape_of(scores.first)[-1])
    value_channels = axes_of(shape_of(value)[-1 if contracted_last else -2])
    q, k = (scores.second, scores.first) if swapped else (scores.first, scores.second)
    outside = tuple(outer)
    flat = leaves(sum(lead, ()))
    if len(lead) != 2:  # rank 4 at most: what most kernels take
        lead = tuple((axis,) for axis in flat) if len(flat) <= 2 else ((flat[0],), flat[1:])
    made_lead = tuple(leaves(dim) for dim in made[:-2])
    return Attention(
        query=(q, (*made_lead, channels, queries) if swapped else (*made_lead, queries, channels)),
        key=(k, (*made_lead, keys, channels) if swapped else (*made_lead, channels, keys)),
        value=(value, (*outside, keys, value_channels) if contracted_last else (*outside, value_channels, keys)),
        output=(output, (*outside, queries, value_channels) if contracted_last else (*outside, value_channels, queries)),
        lead=lead,
        queries=queries,
        keys=keys,
        channels=channels,
        value_channels=value_channels,
        scale=scores.scale,
        masks=tuple((mask, _mask_layout(mask, layouts[mask.at])) for mask in scores.masks),
        dead=(*scores.chain, *forward, output),
    )


def _moved(node: Node, before: Layout) -> Layout:
    """The layout after ``node``: permuted, regrouped, or the same for an elementwise node."""
    order = permutation(node)
    if order is not None:
        return tuple(before[dim] for dim in order)
    if node.target not in RESHAPES:
        return before
    flat = leaves(sum(before, ()))
    sizes = [(dim, size) for dim, size in enumerate(shape_of(node)) if not same_size(size, 1)]
    after: list[tuple[Axis, ...]] = [()] * len(shape_of(node))
    while flat and sizes:
        merged = _prefix([axis.size for axis in flat], sizes[0][1])
        if merged:
            after[sizes[0][0]] = flat[:merged]
            flat, sizes = flat[merged:], sizes[1:]
            continue
        split = _prefix([size for _, size in sizes], flat[0].size)
        if not split:
            break
        flat[0].parts = tuple(Axis(size) for _, size in sizes[:split])
        for (dim, _), part in zip(sizes[:split], flat[0].parts, strict=True):
            after[dim] = (part,)
        flat, sizes = flat[1:], sizes[split:]
    if flat or sizes:
        raise NoMatchError(f"'{node.name}' mixes dimensions between the two products")
    return tuple(after)


def _prefix(sizes: Sequence[Any], wanted: Any) -> int:
    """How many leading sizes multiply to ``wanted``; 0 when none do."""
    product: Any = 1
    for count, size in enumerate(sizes, start=1):
        product = product * size
        if same_size(product, wanted):
            return count
    return 0


def _mask_layout(mask: MaskStep, at: Layout) -> Layout:
    """The mask's own layout: the scores' trailing dimensions, () where it broadcasts."""
    sizes, full = shape_of(mask.tensor), shape_of(mask.at)
    dims: list[tuple[Axis, ...]] = []
    for offset in range(-len(sizes), 0):
        if same_size(sizes[offset], 1):
            dims.append(())
        elif same_size(sizes[offset], full[offset]):
            dims.append(leaves(at[offset]))
        else:
            raise NoMatchError(f"the mask '{mask.tensor.name}' is not proved to broadcast to the scores")
    return tuple(dims)


def live_users(node: Node) -> list[Node]:
    """Users of the tensor's values: not assertions on its metadata, nor what reads its sizes."""
    return [user for user in node.users if user.target not in ASSERTIONS | SIZE_READERS]


def _walk(node: Any, user: Node, constant: Constant, after: float, depth: int) -> Scores:
    """Walk from the softmax's input up to the product; ``after`` is the product of the factors applied later."""
    if not isinstance(node, Node) or node.op != "call_function":
        raise NoMatchError("no product of queries and keys leads to the softmax", depth)
    if live_users(node) != [user]:
        raise NoMatchError(f"the scores '{node.name}' are used elsewhere too", depth)
    up = depth + 1
    if node.target in PRODUCTS or node.target is aten.baddbmm.default:
        return _product(node, constant, after, up)
    if node.target in CASTS or node.target in NOOPS:
        if not dtype_of(node).is_floating_point:
            raise NoMatchError(f"the scores are cast to {dtype_of(node)}", up)
        inner = _walk(node.args[0], node, constant, after, up)
    elif node.target in RESHAPES or node.target in PERMUTES:
        inner = _walk(node.args[0], node, constant, after, up)
    elif (scaled := number_factor(node, constant)) is not None:
        inner = _walk(scaled[0], node, constant, after * scaled[1], up)
    elif node.target in (aten.add.Tensor, aten.sub.Tensor):
        inner = _added(node, constant, after, up)
    elif node.target in (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther):
        inner = _where(node, constant, after, up)
    elif node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        tensor, mask, value = node.args[:3]
        inner = _filled(node, tensor, mask, value, False, constant, after, up)
    elif node.target in (aten.mul.Tensor, aten.div.Tensor):
        raise NoMatchError(f"the scale '{node.name}' is a tensor, not a constant", up)
    else:
        raise NoMatchError(f"'{node.target}' between the scores and the softmax is no step of attention", up)
    return replace(inner, chain=(*inner.chain, node))


def _product(node: Node, constant: Constant, after: float, depth: int) -> Scores:
    masks: tuple[MaskStep, ...] = ()
    first, second = node.args[-2:]
    if node.target is aten.baddbmm.default:
        bias, first, second = node.args[:3]
        beta, alpha = (constant(node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
        if beta is None or alpha is None or not isinstance(bias, Node):
            raise NoMatchError("the scale of baddbmm is not a constant", depth)
        if beta != 0:
            masks = (MaskStep(bias, node, beta * after),)
        after *= alpha
    if not isinstance(first, Node) or not isinstance(second, Node):
        raise NoMatchError("the product has no two tensors", depth)
    if len(shape_of(first)) < 2 or len(shape_of(second)) < 2:
        raise NoMatchError("the product is of vectors", depth)
    return Scores(first, second, node, after, masks, (node,))


def _added(node: Node, constant: Constant, after: float, depth: int) -> Scores:
    alpha = constant(node.kwargs.get("alpha", 1))
    if alpha is None:
        raise NoMatchError("the factor of an added mask is not a constant", depth)
    sign = -alpha if node.target is aten.sub.Tensor else alpha
    reasons: list[NoMatchError] = []
    # (scores, mask, factor on the scores, factor on the mask); either may stand first
    for tensor, mask, on_tensor, on_mask in (
        (node.args[0], node.args[1], 1.0, sign),
        (node.args[1], node.args[0], sign, 1.0),
    ):
        if not isinstance(tensor, Node) or not isinstance(mask, Node) or mask is tensor:
            reasons.append(NoMatchError("a number is added to the scores", depth))
            continue
        try:
            inner = _walk(tensor, node, constant, after * on_tensor, depth)
        except NoMatchError as reason:
            reasons.append(reason)
            continue
        _check_broadcast(node, tensor, depth)
        step = MaskStep(mask, node, on_mask * after)
        fill = _low_or_zero(mask, constant)
        if fill is not None and -math.inf < fill * step.factor <= ABSORBS and not any(m.fill for m in inner.masks):
            step = replace(step, fill=fill * step.factor, additive=True)
        return replace(inner, masks=(*inner.masks, step))
    raise max(reasons, key=lambda reason: reason.depth)


def _low_or_zero(mask: Any, constant: Constant) -> float | None:
    """The number c of a float mask that is c or 0 everywhere, made of a bool one; None of another."""
    factor = 1.0
    while isinstance(mask, Node) and mask.op == "call_function":
        scaled = number_factor(mask, constant)
        if scaled is not None:
            mask, factor = scaled[0], factor * scaled[1]
        elif mask.target in CASTS:
            if dtype_of(mask.args[0]) is torch.bool:
                return factor
            mask = mask.args[0]
        elif mask.target in NOOPS | RESHAPES | PERMUTES | {aten.slice.Tensor, aten.select.int}:
            mask = mask.args[0]
        elif mask.target is aten.sub.Tensor and constant(mask.args[0]) == 1.0 and not mask.kwargs:  # 1 − mask
            mask = mask.args[1]
        elif mask.target is aten.where.self:
            values = {constant(value) for value in mask.args[1:]}
            if None in values or 0.0 not in values or len(values) != 2:
                return None
            return factor * (values - {0.0}).pop()
        else:
            return None
    return None


def _where(node: Node, constant: Constant, after: float, depth: int) -> Scores:
    condition, on_true, on_false = node.args[:3]
    if constant(on_true) is not None:
        return _filled(node, on_false, condition, on_true, False, constant, after, depth)
    if constant(on_false) is not None:
        return _filled(node, on_true, condition, on_false, True, constant, after, depth)
    raise NoMatchError("the value of masked scores is not a constant", depth)


def _filled(
    node: Node, tensor: Any, mask: Any, value: Any, inverted: bool, constant: Constant, after: float, depth: int
) -> Scores:
    number = constant(value)
    if number is None:
        raise NoMatchError("the value of masked scores is not a constant", depth)
    if not number * after <= MASKED_AT_MOST:
        raise NoMatchError(f"masked scores get {number * after:g}, which does not mask (above {MASKED_AT_MOST:g})", depth)
    inner = _walk(tensor, node, constant, after, depth)
    _check_broadcast(node, tensor, depth)
    step = MaskStep(mask, node, fill=number * after, inverted=inverted)
    return replace(inner, masks=(*inner.masks, step))


def _check_broadcast(node: Node, tensor: Node, depth: int) -> None:
    if not same_shape(shape_of(node), shape_of(tensor)):
        raise NoMatchError("a mask is larger than the scores", depth)


def _forward(softmax: Node) -> tuple[tuple[Node, ...], Node]:
    """Follow the probabilities to the one product with the value: (softmax … its operand, the product)."""
    path = [softmax]
    while True:
        node = path[-1]
        users = live_users(node)
        if len(users) != 1:
            raise NoMatchError(f"the probabilities '{node.name}' are used {len(users)} times, not once")
        user = users[0]
        if user.target in PRODUCTS:
            return tuple(path), user
        if user.target not in CASTS | NOOPS | RESHAPES | PERMUTES:
            raise NoMatchError(f"the probabilities go to '{user.target}', not to a product with the value")
        if not dtype_of(user).is_floating_point:
            raise NoMatchError(f"the probabilities are cast to {dtype_of(user)}")
        path.append(user)
