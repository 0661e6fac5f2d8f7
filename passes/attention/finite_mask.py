"""Masks that leave every row a key: floats that are computed and not filled, and what canonicalization has repaired."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.fx import Node

from sam3x.passes.graph.aten_nodes import RESHAPES, same_size, shape_of

_aten = torch.ops.aten

_MIXING = {
    _aten.linear.default,
    _aten.addmm.default,
    _aten.mm.default,
    _aten.bmm.default,
    _aten.matmul.default,
    _aten.layer_norm.default,
    _aten.convolution.default,
}
"""Sums of weighted numbers: −∞ going in hides no key, it makes NaN as soon as a weight has the other sign."""

_BOUNDED = {
    _aten.sigmoid.default,
    _aten.tanh.default,
    _aten.softmax.int,
    _aten._softmax.default,
    _aten.sin.default,
    _aten.cos.default,
}

_CARRYING = RESHAPES | {
    _aten.permute.default,
    _aten.transpose.int,
    _aten.slice.Tensor,
    _aten.select.int,
    _aten.cat.default,
    _aten.stack.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten._to_copy.default,
    _aten.relu.default,
    _aten.gelu.default,
    _aten.silu.default,
    _aten.neg.default,
    _aten.abs.default,
    _aten.add.Tensor,
    _aten.sub.Tensor,
    _aten.mul.Tensor,
}
"""Finite where all that they read is finite."""

_FILLS = {_aten.full.default, _aten.full_like.default, _aten.scalar_tensor.default}
_ZEROS = {_aten.zeros.default, _aten.zeros_like.default, _aten.ones.default, _aten.ones_like.default, _aten.new_zeros.default}


_MOVING = {_aten.unsqueeze.default, _aten.expand.default, _aten.reshape.default, _aten.clone.default}


def hides_no_row(mask: Node) -> bool:
    """Whether every row of a mask, bool (True = may attend) or float, is known to leave a key that may be attended."""
    if mask.meta["val"].dtype is not torch.bool:
        return is_finite(mask)
    while _keeps_rows(mask):
        mask = mask.args[0]  # type: ignore[assignment]
    if mask.target is not _aten.logical_or.default:
        return False
    return any(
        other.target is _aten.logical_not.default
        and other.args[0].target is _aten.any.dim
        and other.args[0].args == (allowed, -1, True)
        for allowed, other in (mask.args[:2], mask.args[1::-1])
    )


def _keeps_rows(node: Node) -> bool:
    """Whether each row of ``node`` is one of what it is made of."""
    if node.target is _aten.select.int:
        return 0 <= int(node.args[1]) < len(shape_of(node)) - 1
    return node.target in _MOVING and same_size(shape_of(node)[-1], shape_of(node.args[0])[-1])


def is_finite(mask: Node) -> bool:
    """Whether no element of a float tensor can be −∞, told by how it is computed; False where that cannot be told.

    A position bias that a layer computes (SAM3's decoder: ``boxRPB_embed_x`` in sam3/model/decoder.py) is such a mask.
    """
    waiting, seen = [mask], set()
    while waiting:
        node = waiting.pop()
        if node in seen or node.target in _MIXING or node.target in _BOUNDED or node.target in _ZEROS:
            continue
        seen.add(node)
        if node.target in _FILLS:
            fill = node.args[-1]
            if not isinstance(fill, (int, float)) or not math.isfinite(fill):
                return False
        elif node.target is _aten.where.self:
            waiting += [item for item in node.args[1:] if isinstance(item, Node)]
        elif node.target in _CARRYING:
            read, numbers = _read(node)
            if not all(map(math.isfinite, numbers)):
                return False
            waiting += read
        else:
            return False
    return True


def _read(node: Node) -> tuple[list[Node], list[float]]:
    """Tensors whose elements it carries, and numbers that it adds or multiplies with."""
    tensors: list[Node] = []
    numbers: list[float] = []
    arithmetic = node.target in (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor)
    first = node.args[:2] if arithmetic else node.args[:1]
    for item in (*first, *(node.kwargs.values() if arithmetic else ())):
        if isinstance(item, Node):
            tensors.append(item)
        elif isinstance(item, Iterable):
            tensors += [inner for inner in item if isinstance(inner, Node)]
        elif isinstance(item, (int, float)):
            numbers.append(item)
    return tensors, numbers
