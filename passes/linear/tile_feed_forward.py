"""Feed-forward blocks whose hidden layer may need much memory, marked to be computed a tile of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn import functional

from sam3x.passes.base import MatchFailure, Pass, PassResult, graph_modules
from sam3x.passes.graph.emitter import Emitter

_aten = torch.ops.aten
_LINEAR = _aten.linear.default

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


class TileFeedForwardPass(Pass):
    """``linear``, activation, ``linear`` → ``sam3x::tiled_feed_forward`` wherever the hidden layer is not known to be small.

    Args:
        small: bytes of a hidden layer that are left alone.
    """

    name = "tile_feed_forward"

    def __init__(self, small: int) -> None:
        self.small = small

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, failures = 0, []
        for _, module in graph_modules(program):
            for second in module.graph.find_nodes(op="call_function", target=_LINEAR):
                middle = second.args[0]
                activation = _activation(middle)
                first = middle.args[0] if activation else None
                if activation is None or first.target is not _LINEAR:
                    continue
                reason = self._refused(first, middle)
                if reason:
                    failures.append(MatchFailure(node=second.name, reason=reason))
                    continue
                emit = Emitter(module, second)
                made = emit(TILED_FEED_FORWARD, *_operands(first), activation, *_operands(second)[1:])
                second.replace_all_uses_with(made)
                for node in (second, middle, first):
                    module.graph.erase_node(node)
                rewrites += 1
        return PassResult(rewrites=rewrites, match_failures=tuple(failures))

    def _refused(self, first: Node, middle: Node) -> str | None:
        if len(first.users) > 1 or len(middle.users) > 1:
            return "the hidden layer is used elsewhere too"
        hidden = middle.meta["val"]
        if hidden.dim() < 2:
            return "there is one row"
        sizes = tuple(hidden.shape)
        if all(isinstance(size, int) for size in sizes) and math.prod(sizes) * hidden.element_size() <= self.small:
            return f"its hidden layer takes {math.prod(sizes) * hidden.element_size():,} bytes"
        return None


def _operands(linear: Node) -> tuple[Node, Node, Node | None]:
    x, weight, *bias = linear.args
    return x, weight, bias[0] if bias else None  # type: ignore[return-value]


def _activation(node: object) -> str | None:
    if not isinstance(node, Node):
        return None
    if node.target is _aten.gelu.default:
        approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(approximate))
    return {_aten.relu.default: "relu", _aten.silu.default: "silu"}.get(node.target)  # type: ignore[call-overload]
