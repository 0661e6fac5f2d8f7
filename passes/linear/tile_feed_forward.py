"""Feed-forward blocks whose hidden layer may need much memory, marked to be computed a tile of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import argument, aten
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.node_pass import NodePass

_LINEAR = aten.linear.default

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}
"""Name → what lies between the two products."""

_library = torch.library.Library("sam3x", "FRAGMENT")
_library.define(
    "tiled_feed_forward(Tensor x, Tensor weight1, Tensor? bias1, str activation, Tensor weight2, Tensor? bias2) -> Tensor"
)
TILED_FEED_FORWARD = torch.ops.sam3x.tiled_feed_forward.default
"""(…, C), (H, C), (H), a name of ``ACTIVATIONS``, (E, H), (E) → (…, E): ``linear``, activation, ``linear``."""


@torch.library.impl(_library, "tiled_feed_forward", "CompositeExplicitAutograd")
def _feed_forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, activation: str, weight2: Tensor, bias2: Tensor | None
) -> Tensor:
    return functional.linear(ACTIVATIONS[activation](functional.linear(x, weight1, bias1)), weight2, bias2)


@torch.library.impl(_library, "tiled_feed_forward", "Meta")
def _shape(x: Tensor, weight1: Tensor, bias1: Tensor | None, activation: str, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight2.shape[0]))


class TileFeedForwardPass(NodePass):
    """``linear``, activation, ``linear`` → ``sam3x::tiled_feed_forward`` wherever the hidden layer is not known to be small.

    Args:
        small: bytes of a hidden layer that are left alone.
    """

    name = "tile_feed_forward"
    operators = (_LINEAR,)

    def __init__(self, small: int) -> None:
        self.small = small

    def rewrite(self, emit: Emitter, node: Node) -> Node | None:
        middle: Any = node.args[0]
        activation = _activation(middle)
        if activation is None or middle.args[0].target is not _LINEAR:
            return None
        (first,) = middle.all_input_nodes
        if len(first.users) > 1 or len(middle.users) > 1:
            raise NoMatchError("the hidden layer is used elsewhere too")
        hidden = middle.meta["val"]
        if hidden.dim() < 2:
            raise NoMatchError("there is one row")
        size = math.prod(hidden.shape) * hidden.element_size() if all(isinstance(n, int) for n in hidden.shape) else math.inf
        if size <= self.small:
            raise NoMatchError(f"its hidden layer takes {size:,} bytes")
        return emit(TILED_FEED_FORWARD, *_operands(first), activation, *_operands(node)[1:])


def _operands(linear: Node) -> tuple[Node, Node, Node | None]:
    x, weight, *bias = linear.args
    return x, weight, bias[0] if bias else None  # type: ignore[return-value]


def _activation(node: object) -> str | None:
    if not isinstance(node, Node):
        return None
    if node.target is aten.gelu.default:
        approximate = argument(node, 1, "approximate", "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(approximate))
    return {aten.relu.default: "relu", aten.silu.default: "silu"}.get(node.target)  # type: ignore[call-overload]
