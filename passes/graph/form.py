"""The parts of an attention: its axes, the layout of each operand, its masks, and the reason why something is none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from sam3x.passes.graph.aten_nodes import same_size


class NotAttentionError(Exception):
    """Carries the reason why a softmax is left alone; ``depth`` orders reasons by how close the match came."""

    def __init__(self, reason: str, depth: int = 0) -> None:
        super().__init__(reason)
        self.depth = depth


@dataclass(eq=False, slots=True)
class Axis:
    """One dimension larger than 1, told apart by identity; ``parts`` once a reshape has split it."""

    size: Any
    parts: tuple[Axis, ...] = ()


Layout = tuple[tuple[Axis, ...], ...]
"""The axes, outermost first, that make up each dimension of a tensor; () for a dimension of size 1."""


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
    dead: tuple[Node, ...] = field(default=())


def leaves(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """The axes with every split one replaced by its parts."""
    return tuple(leaf for axis in axes for leaf in (leaves(axis.parts) if axis.parts else (axis,)))


def axes_of(size: Any) -> tuple[Axis, ...]:
    """A fresh axis, none for size 1."""
    return () if same_size(size, 1) else (Axis(size),)
