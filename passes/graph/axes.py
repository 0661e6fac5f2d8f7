"""Dimensions followed by identity, not by size, through permutes and reshapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from sam3x.passes.graph.aten_nodes import expression, same_size


@dataclass(eq=False, slots=True)
class Axis:
    """One dimension larger than 1, told apart by identity; ``parts`` once a reshape has split it."""

    size: Any
    parts: tuple[Axis, ...] = ()


Layout = tuple[tuple[Axis, ...], ...]
"""The axes, outermost first, that make up each dimension of a tensor; () for a dimension of size 1."""


def leaves(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """The axes with every split one replaced by its parts."""
    return tuple(leaf for axis in axes for leaf in (leaves(axis.parts) if axis.parts else (axis,)))


def axes_of(size: Any) -> tuple[Axis, ...]:
    """A fresh axis, none for size 1."""
    return () if same_size(size, 1) else (Axis(size),)


def regrouped(layout: Layout, shape: Sequence[Any]) -> Layout | None:
    """The axes of ``layout`` cut into dimensions of the given sizes, split where they must be; None where unknown."""
    rest = list(leaves(itertools.chain(*layout)))
    result: list[tuple[Axis, ...]] = []
    for size in shape:
        group: list[Axis] = []
        missing = expression(size)
        while missing != 1:
            if not rest:
                return None
            ratio = sympy.cancel(missing / expression(rest[0].size))
            if isinstance(ratio, sympy.Integer) or (ratio.is_integer and not isinstance(rest[0].size, int)) or _whole(ratio):
                group.append(rest.pop(0))
                missing = ratio
                continue
            if not (isinstance(missing, sympy.Integer) and isinstance(rest[0].size, int) and rest[0].size % int(missing) == 0):
                return None
            axis = rest.pop(0)
            axis.parts = (Axis(int(missing)), Axis(axis.size // int(missing)))
            group.append(axis.parts[0])
            rest.insert(0, axis.parts[1])
            missing = sympy.Integer(1)
        result.append(tuple(group))
    return None if rest else tuple(result)


def _whole(ratio: sympy.Expr) -> bool:
    """Whether a quotient of sizes has no denominator left."""
    return sympy.fraction(ratio)[1] == 1
