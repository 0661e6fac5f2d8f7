"""Where the rows of a tensor are, and where an operator leaves them.

``Place(dim, left, right)`` says that dimension ``dim`` of a tensor counts left × rows × right, so that merging and splitting
dimensions keeps track of them. A mask of pairs, queries × keys, has its rows at two places. A tensor is followed as long as
what it holds for the chosen rows, at all of its places, is what it would hold if the others were not there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import CASTS, NOOPS, SHAPING, SOFTMAXES, argument, aten, divided, expression, permutation

SOFTMAX = SOFTMAXES | {aten._log_softmax.default}
_SPLITS = {aten.split_with_sizes.default, aten.split.Tensor}
_ALONG = {aten.slice.Tensor, aten.select.int, aten.cumsum.default, aten.unbind.int} | _SPLITS | SOFTMAX
_REDUCTIONS = {aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default}
_REDUCTIONS |= {aten.any.dim, aten.any.dims, aten.all.dim, aten.all.dims}
_PRODUCTS = {aten.matmul.default, aten.bmm.default}
_MADE = {aten.full.default, aten.zeros.default, aten.ones.default}
_LIKE = NOOPS | CASTS | {aten.where.self, aten.full_like.default, aten.zeros_like.default, aten.ones_like.default}


@dataclass(frozen=True, slots=True)
class Place:
    """A dimension that counts left × rows × right."""

    dim: int
    left: sympy.Expr = sympy.S.One
    right: sympy.Expr = sympy.S.One

    def at(self, dim: int) -> Place:
        """The same in another dimension."""
        return Place(dim, self.left, self.right)


Places = tuple[Place, ...]
"""All places of a tensor, by dimension."""


def shape_of(value: torch.Tensor) -> list[sympy.Expr]:
    """Sizes as expressions in the graph's symbols."""
    return [divided(expression(size)) for size in value.shape]


def places_after(node: Node, inside: Mapping[Node, Places], symbol: sympy.Symbol) -> Places:
    """The places of the result; ``inside``: those of the operands that have any. ``symbol`` is the number of rows.

    Raises:
        NoMatchError: rows may mix, or the operator is not known.
    """
    if _reads_count(node, symbol):
        raise NoMatchError(f"{node.target} ('{node.name}') works with the number of rows itself")
    found = _places_after(node, inside, symbol)
    if found is None:
        raise NoMatchError(f"{node.target} ('{node.name}') may mix the chosen rows with the others")
    return found


def is_placed(value: Any, places: Places, symbol: sympy.Symbol) -> bool:
    """Whether exactly these dimensions of a tensor, or of each in a list, count rows."""
    if isinstance(value, (list, tuple)):
        return all(is_placed(item, places, symbol) for item in value)
    shape = shape_of(value)
    if [dim for dim, size in enumerate(shape) if symbol in size.free_symbols] != [place.dim for place in places]:
        return False
    return all(sympy.expand(place.left * symbol * place.right - shape[place.dim]) == 0 for place in places)


def fits(tensor: Node, own: Places, places: Places, rank: int) -> bool:
    """Whether ``tensor``, broadcast to ``rank`` dimensions, has its rows at ``places``; where not, it is one for all rows."""
    value = tensor.meta["val"]
    moved = _broadcast(value, own, rank)
    if value.dim() > rank or not set(moved) <= set(places):
        return False
    dims = [place.dim - (rank - value.dim()) for place in places if place not in moved]
    return all(dim < 0 or statically_known_true(value.shape[dim] == 1) for dim in dims)


def _broadcast(value: torch.Tensor, own: Places, rank: int) -> Places:
    """Places counted from the last dimension."""
    return tuple(place.at(place.dim + rank - value.dim()) for place in own)


def _reads_count(node: Node, symbol: sympy.Symbol) -> bool:
    """Whether a number of rows goes in that is no size of the result."""
    if node.target in SHAPING or node.target is aten.expand.default:
        return False
    values: list[Any] = []
    given = (node.args[1:] if node.target in _MADE else node.args, node.kwargs)
    torch.fx.node.map_arg(given, lambda item: values.append(item.meta.get("val")))
    return any(isinstance(value, torch.SymInt) and symbol in expression(value).free_symbols for value in values)


def _places_after(node: Node, inside: Mapping[Node, Places], symbol: sympy.Symbol) -> Places | None:
    """None where rows may mix."""
    target: Any = node.target
    source: Any = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if target in _MADE:  # a constant is the same for every row
        return tuple(Place(dim) for dim, size in enumerate(shape_of(node.meta["val"])) if symbol in size.free_symbols)
    if target is aten.expand.default:
        return _expanded(node, inside.get(source, ()), symbol)
    if target in _PRODUCTS:
        return _product(node, inside)
    if target is aten.cat.default:
        return _joined(node, inside)
    tags = getattr(target, "tags", ())
    if target in _LIKE or (torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags):
        return _aligned(node, inside)
    if set(inside) != {source}:
        return None
    return _places_in(node, source.meta["val"], inside[source], symbol)


def _places_in(node: Node, value: Any, own: Places, symbol: sympy.Symbol) -> Places | None:
    """After an operator on one tensor, of value ``value``."""
    target: Any = node.target
    if target is operator.getitem:
        return own
    if "dim" in node.kwargs or "keepdim" in node.kwargs:  # export writes both as plain arguments
        return None
    rank = value.dim()
    dims = [place.dim for place in own]
    if target in SHAPING:
        return _reshaped(node, shape_of(value), own, symbol)
    if (order := permutation(node)) is not None:
        return _sorted(place.at(order.index(place.dim)) for place in own)
    if target is aten.linear.default:
        return own if rank - 1 not in dims else None
    if target is aten.layer_norm.default:
        return own if max(dims) < rank - len(node.args[1]) else None
    if target in _ALONG:
        at = argument(node, 2 if target in _SPLITS else 1, "dim", 0) % rank
        return (
            None if at in dims else tuple(place.at(place.dim - (target is aten.select.int and at < place.dim)) for place in own)
        )
    if target in _REDUCTIONS and (along := _reduced(node)):
        gone = {dim % rank for dim in along}
        kept = len(node.args) > 2 and node.args[2]
        if gone & set(dims):
            return None
        return tuple(place.at(place.dim - (0 if kept else sum(dim < place.dim for dim in gone))) for place in own)
    return None


def _reduced(node: Node) -> list[int]:
    """The dimensions that a reduction names; none where it takes all."""
    dims: Any = argument(node, 1, "dim")
    return [dims] if isinstance(dims, int) else list(dims or ())


def _sorted(places: Any) -> Places:
    return tuple(sorted(places, key=lambda place: place.dim))


def _reshaped(node: Node, shape: list[sympy.Expr], own: Places, symbol: sympy.Symbol) -> Places:
    """Elements keep their order, so rows stay where as many elements stand before and within them."""
    new = shape_of(node.meta["val"])
    dims = [dim for dim, size in enumerate(new) if symbol in size.free_symbols]
    places = []
    for place, dim in zip(own, dims, strict=False):
        left = _quotient(math.prod(shape[: place.dim]) * place.left, math.prod(new[:dim]))
        right = _quotient(place.right * math.prod(shape[place.dim + 1 :]), math.prod(new[dim + 1 :]))
        if left is not None and right is not None and sympy.expand(left * symbol * right - new[dim]) == 0:
            places.append(Place(dim, left, right))
    if len(own) != len(dims) or len(places) != len(own):
        raise NoMatchError(f"'{node.name}' reshapes {shape} to {new}, which cuts across rows")
    return tuple(places)


def _quotient(base: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
    """None where the division leaves a rest."""
    found = sympy.cancel(base / divisor)
    return found if sympy.denom(sympy.together(found)) == 1 else None


def _expanded(node: Node, own: Places, symbol: sympy.Symbol) -> Places | None:
    """A dimension of size 1 that becomes rows is the same for every row."""
    source: Any = node.args[0]
    value, rank = source.meta["val"], node.meta["val"].dim()
    places = _broadcast(value, own, rank)
    new = []
    for dim, size in enumerate(shape_of(node.meta["val"])):
        if symbol in size.free_symbols and all(dim != place.dim for place in places):
            at = dim - (rank - value.dim())
            if at >= 0 and not statically_known_true(value.shape[at] == 1):
                return None
            new.append(Place(dim))
    return _sorted((*places, *new))


def _aligned(node: Node, inside: Mapping[Node, Places]) -> Places:
    """Broadcasting: each operand has its rows at the result's places, or is the same for all rows."""
    rank = node.meta["val"].dim()
    places = _sorted({place for item, own in inside.items() for place in _broadcast(item.meta["val"], own, rank)})
    for item in node.all_input_nodes:
        if isinstance(item.meta["val"], torch.Tensor) and not fits(item, inside.get(item, ()), places, rank):
            if item in inside:
                raise NoMatchError(f"{node.target} ('{node.name}') combines rows at different places")
            raise NoMatchError(f"{node.target} ('{node.name}') meets '{item.name}', whose rows are not known")
    return places


def _joined(node: Node, inside: Mapping[Node, Places]) -> Places | None:
    """Parts whose rows are at the same places, side by side in another dimension."""
    parts: Any = node.args[0]
    dim: Any = argument(node, 1, "dim", 0)
    own = inside.get(parts[0], ())
    aside = all(place.dim != dim % node.meta["val"].dim() for place in own)
    return own if aside and all(inside.get(part, ()) == own for part in parts) else None


def _product(node: Node, inside: Mapping[Node, Places]) -> Places | None:
    """Batch dimensions stay apart; so do the rows of the left factor when the right one has none."""
    left: Any
    right: Any
    left, right = node.args[:2]
    own, rank = inside.get(left, ()), left.meta["val"].dim()
    if any(place.dim == rank - 1 for place in own):
        return None
    if node.target is aten.matmul.default and right.meta["val"].dim() == 2 < rank:
        return own if right not in inside else None  # as a linear layer
    batch = tuple(place for place in own if place.dim < rank - 2)
    return own if right.meta["val"].dim() == rank and inside.get(right, ()) == batch else None
