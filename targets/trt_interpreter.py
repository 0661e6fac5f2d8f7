"""From the canonical graph to one TensorRT network. Import inside ``trt_driver.named_device``."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorrt as trt
import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch_tensorrt import Input
from torch_tensorrt.dynamo._settings import CompilationSettings
from torch_tensorrt.dynamo.conversion import impl
from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_CONVERTERS
from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter
from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor

from sam3x.passes.attention_ops import TILED_ATTENTION
from sam3x.passes.cond_graph import ASSERTIONS, COND
from sam3x.targets.trt_loop import tiled_attention

aten = torch.ops.aten


class Interpreter(TRTInterpreter):
    """Torch-TensorRT's interpreter with converters of our own, which its process-wide registry never sees.

    They cover what torch keeps whole and Torch-TensorRT decomposes first (``layer_norm``), and what it has no converter for:
    ``torch.cond``, attention in tiles.
    """

    def __init__(
        self,
        module: GraphModule,
        inputs: Sequence[Input],
        names: tuple[Sequence[str], Sequence[str]],
        bounds: Mapping[str, int],
    ) -> None:
        self.bounds = bounds
        self.held: list[Any] = []
        self.conditional = any(node.target is COND for node in module.graph.nodes)
        super().__init__(
            module,
            inputs,
            compilation_settings=CompilationSettings(assume_dynamic_shape_support=True),
            input_binding_names=names[0],
            output_binding_names=names[1],
        )

    def largest(self, node: Node) -> tuple[int, ...]:
        """The upper ends of a node's sizes."""
        return tuple(largest_size(size, self.bounds) for size in node.meta["val"].shape)

    def validate_conversion(self) -> set[str]:
        """Nothing: ``unconverted`` has said it before, by name and reason."""
        return set()

    def construct(self) -> Any:
        """The network, every node converted."""
        self._construct_trt_network_def()
        return self.ctx.net

    def output(self, target: str, args: Any, kwargs: Any) -> Any:
        """An input that is an output too (``memory_text``) is copied: named as the output, it would lose its own name."""

        def own(value: Any) -> Any:
            given = isinstance(value, trt.ITensor) and value.is_network_input
            return self.ctx.net.add_identity(value).get_output(0) if given else value

        (values,) = args
        copied = tuple(map(own, values)) if isinstance(values, (tuple, list)) else own(values)
        return super().output(target, (copied,), kwargs)

    def run_node(self, n: Node) -> Any:
        if n.op == "get_attr" and isinstance(child := getattr(self.module, str(n.target), None), GraphModule):
            self.const_mapping[str(n)] = ((), "graph")  # read by a log line of the node that takes it
            return child
        return super().run_node(n)

    def branch(self, branch: GraphModule, operands: Sequence[Any], prefix: str) -> list[Any]:
        """Convert a branch graph into the network; returns what it returns."""
        outer = (self._cur_node, self._cur_node_name, self.module)  # type: ignore[has-type]
        values: dict[Node, Any] = {}
        remaining = iter(operands)
        try:
            self.module = branch  # where get_attr looks
            for node in branch.graph.nodes:
                if node.op == "placeholder":
                    values[node] = next(remaining)
                elif node.op == "output":
                    return [values[item] if isinstance(item, Node) else item for item in node.args[0]]
                elif node.op == "get_attr" and isinstance(child := getattr(branch, str(node.target), None), GraphModule):
                    values[node] = child
                else:
                    self._cur_node, self._cur_node_name = node, f"{prefix}_{node.name}"
                    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda item: values[item])
                    values[node] = getattr(self, node.op)(node.target, args, kwargs)
        finally:
            self._cur_node, self._cur_node_name, self.module = outer
        raise AssertionError("a graph ends with its output")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        own = CONVERTERS.get(target)
        return super().call_function(target, args, kwargs) if own is None else own(self, args, kwargs)


def largest_size(size: Any, bounds: Mapping[str, int]) -> int:
    """The upper end of a size; a symbol without a name of its own is dac's half (``bounds``' default)."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({symbol: bounds[str(symbol)] for symbol in expression.free_symbols}))


@contextlib.contextmanager
def described(module: GraphModule) -> Iterator[None]:
    """Every node with the ``tensor_meta`` by which Torch-TensorRT chooses converters; torch.fx's shape propagation gives it."""
    told: list[Node] = []
    try:
        for child in module.modules():
            for node in child.graph.nodes if isinstance(child, GraphModule) else ():
                if isinstance(node.meta.get("val"), torch.Tensor) and "tensor_meta" not in node.meta:
                    node.meta["tensor_meta"] = _extract_tensor_metadata(node.meta["val"])
                    told.append(node)
        yield
    finally:
        for node in told:
            del node.meta["tensor_meta"]


def unconverted(module: GraphModule) -> list[tuple[str, str]]:
    """(node, reason) of everything in ``module`` and its branches that no converter takes. Call inside ``described``."""
    DYNAMO_CONVERTERS.set_compilation_settings(CompilationSettings(assume_dynamic_shape_support=True))
    found = []
    for node in module.graph.nodes:
        if node.op == "get_attr" and isinstance(child := getattr(module, str(node.target), None), GraphModule):
            found += unconverted(child)
        elif node.op == "call_function" and node.target not in CONVERTERS and DYNAMO_CONVERTERS.get(node) is None:
            candidates = node.target in DYNAMO_CONVERTERS
            reason = "its converter takes no such arguments" if candidates else "no converter"
            found.append((node.name, f"{node.target}: {reason}"))
    return found


def _layer_norm(self: Interpreter, args: Any, kwargs: Any) -> Any:
    """``INormalizationLayer`` over the last dimensions."""
    values = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)) | dict(kwargs)
    source, shape = values["input"], values["normalized_shape"]
    ctx, name = self.ctx, str(self._cur_node_name)
    rank = len(source.shape)
    own = [1] * (rank - len(shape)) + list(shape)

    def operand(kind: str, fill: float) -> Any:
        given = values.get(kind)
        value = torch.full(tuple(shape), fill) if given is None else given
        if isinstance(value, torch.Tensor):
            return get_trt_tensor(ctx, value.reshape(own), f"{name}_{kind}", source.dtype)
        return impl.shuffle.reshape(ctx, aten.reshape.default, None, f"{name}_{kind}", value, own)

    axes = sum(1 << axis for axis in range(rank - len(shape), rank))
    layer = ctx.net.add_normalization_v2(source, operand("weight", 1.0), operand("bias", 0.0), axes)
    layer.epsilon = values.get("eps", 1e-5)
    layer.name = name
    return layer.get_output(0)


def _full_like(self: Interpreter, args: Any, kwargs: Any) -> Any:
    name, like = str(self._cur_node_name), args[0]
    dtype = self._cur_node.meta["val"].dtype  # type: ignore[union-attr]
    sizes = [impl.shape.shape(self.ctx, aten.sym_size.int, None, f"{name}_{i}", like, i) for i in range(len(like.shape))]
    value = bool(args[1]) if dtype is torch.bool else float(args[1]) if dtype.is_floating_point else int(args[1])
    return impl.full.full(self.ctx, aten.full.default, None, name, sizes, value, dtype)


def _cond(self: Interpreter, args: Any, kwargs: Any) -> Any:
    """``IIfConditional``: what a branch reads enters through an input layer, what both return leaves through an output one."""
    predicate, true, false, operands = args
    net, name = self.ctx.net, str(self._cur_node_name)
    conditional = net.add_if_conditional()
    conditional.name = name
    conditional.set_condition(predicate)
    entered = [conditional.add_input(item).get_output(0) if isinstance(item, trt.ITensor) else item for item in operands]
    results = [self.branch(branch, entered, f"{name}_{index}") for index, branch in enumerate((true, false))]
    outputs = []
    for index, pair in enumerate(zip(*results, strict=True)):
        ends = [
            net.add_identity(get_trt_tensor(self.ctx, value, f"{name}_{index}")).get_output(0)
            if not isinstance(value, trt.ITensor) or value in entered
            else value
            for value in pair
        ]
        layer = conditional.add_output(*ends)
        layer.name = f"{name}_output_{index}"
        outputs.append(layer.get_output(0))
    return tuple(outputs)


def _getitem(self: Interpreter, args: Any, kwargs: Any) -> Any:
    return args[0][args[1]]


def _alias(self: Interpreter, args: Any, kwargs: Any) -> Any:
    return args[0]


CONVERTERS: dict[Any, Callable[[Interpreter, Any, Any], Any]] = {
    aten.layer_norm.default: _layer_norm,
    aten.full_like.default: _full_like,
    aten.clone.default: _alias,
    aten.alias.default: _alias,
    aten.detach.default: _alias,
    operator.getitem: _getitem,
    COND: _cond,
    TILED_ATTENTION: tiled_attention,
    **dict.fromkeys(ASSERTIONS, lambda self, args, kwargs: None),
}
"""Operator → converter."""
