"""What every lowering of canonical attention shares: reading the node, and torch's zeros for rows whose keys are all masked.

A mask needs no such zeros where it is known to leave every row a key: floats that are computed and not filled, and what
canonicalization has repaired.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import Node

from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import (
    FILLS,
    HEAVY,
    NOOPS,
    PERMUTES,
    RESHAPES,
    SDPA,
    SOFTMAXES,
    argument,
    aten,
    same_size,
    shape_of,
)
from sam3x.passes.graph.emitter import Emitter

_MIXING = HEAVY - {SDPA, aten.baddbmm.default} | {aten.layer_norm.default}
"""Sums of weighted numbers: −∞ going in hides no key, it makes NaN as soon as a weight has the other sign."""

_BOUNDED = SOFTMAXES | {aten.sigmoid.default, aten.tanh.default, aten.sin.default, aten.cos.default}

_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor}
_CARRYING = RESHAPES | PERMUTES | NOOPS | {aten._to_copy.default, aten.slice.Tensor, aten.select.int, aten.cat.default}
_CARRYING |= _SUMS | {aten.stack.default, aten.relu.default, aten.gelu.default, aten.silu.default}
_CARRYING |= {aten.neg.default, aten.abs.default}
"""Finite where all that they read is finite."""

_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.ones.default, aten.ones_like.default, aten.new_zeros.default}


_MOVING = {aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.clone.default}


@dataclass(frozen=True, slots=True)
class Sdpa:
    """The operands of one ``aten.scaled_dot_product_attention``."""

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    scale: float


def read_sdpa(node: Node) -> Sdpa:
    """The operands of ``node``.

    Raises:
        NoMatchError: it is no plain attention.
    """
    if argument(node, 4, "dropout_p", 0.0):
        raise NoMatchError("dropout inside the attention")
    if argument(node, 5, "is_causal", False):
        raise NoMatchError("causal flag")
    if node.kwargs.get("enable_gqa", False):
        raise NoMatchError("grouped-query flag")
    query, key, value = node.args[:3]
    scale = argument(node, 6, "scale")
    if scale is None:
        scale = 1.0 / math.sqrt(int(query.meta["val"].shape[-1]))
    return Sdpa(node, query, key, value, argument(node, 3, "attn_mask"), float(scale))


def guarded(emit: Emitter, mask: Node | None) -> tuple[Node | None, Node | None]:
    """(mask without rows that hide every key, (…, N or 1, 1) bool: the rows that did).

    torch gives zeros there and a softmax alone NaN. A row that hides everything is cleared, which keeps the softmax finite, and
    the lowering then zeroes its output. Both work on the mask, which is small (it broadcasts over heads and mostly over
    queries), never on the scores. A mask that is known to leave every row a key needs none of it.
    Source of the rule: ``_safe_softmax`` in aten/src/ATen/native/transformers/attention.cpp.
    """
    if mask is None:
        return None, None
    if hides_no_row(mask):
        return mask, None
    boolean = mask.meta["val"].dtype is torch.bool
    allowed = mask if boolean else emit(aten.gt.Scalar, mask, float("-inf"))
    hidden = emit(aten.logical_not.default, emit(aten.any.dim, allowed, -1, True))
    if boolean:
        return emit(aten.logical_or.default, mask, hidden), hidden
    return emit(aten.where.self, hidden, emit.number(0.0, mask), mask), hidden


def additive(emit: Emitter, mask: Node, like: Node) -> Node:
    """A mask as numbers to add to the scores of ``like``."""
    dtype = like.meta["val"].dtype
    if mask.meta["val"].dtype is not torch.bool:
        if dtype.itemsize < mask.meta["val"].dtype.itemsize:  # what is finite and lower than ``dtype`` stays finite
            lowest = emit(aten.clamp.default, mask, torch.finfo(dtype).min)
            mask = emit(aten.where.self, emit(aten.isinf.default, mask), mask, lowest)
        return emit.cast(mask, dtype)
    return emit(aten.where.self, mask, emit.number(0.0, like), emit.number(float("-inf"), like))


def zeroed(emit: Emitter, output: Node, hidden: Node | None) -> Node:
    """``output`` with zeros in the rows that saw no key."""
    if hidden is None:
        return output
    return emit.shaped(output, output.meta["val"].shape, aten.where.self, hidden, emit.number(0.0, output), output)


def hides_no_row(mask: Node) -> bool:
    """Whether every row of a mask, bool (True = may attend) or float, is known to leave a key that may be attended."""
    if mask.meta["val"].dtype is not torch.bool:
        return is_finite(mask)
    while _keeps_rows(mask):
        mask = mask.args[0]  # type: ignore[assignment]
    if mask.target is not aten.logical_or.default:
        return False
    return any(
        other.target is aten.logical_not.default
        and other.args[0].target is aten.any.dim
        and other.args[0].args == (allowed, -1, True)
        for allowed, other in (mask.args[:2], mask.args[1::-1])
    )


def _keeps_rows(node: Node) -> bool:
    """Whether each row of ``node`` is one of what it is made of."""
    if node.target is aten.select.int:
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
        if node.target in FILLS:
            fill = node.args[-1]
            if not isinstance(fill, (int, float)) or not math.isfinite(fill):
                return False
        elif node.target is aten.where.self:
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
    arithmetic = node.target in _SUMS
    first = node.args[:2] if arithmetic else node.args[:1]
    for item in (*first, *(node.kwargs.values() if arithmetic else ())):
        if isinstance(item, Node):
            tensors.append(item)
        elif isinstance(item, Iterable):
            tensors += [inner for inner in item if isinstance(inner, Node)]
        elif isinstance(item, (int, float)):
            numbers.append(item)
    return tensors, numbers
