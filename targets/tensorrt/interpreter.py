"""From the canonical graph to one TensorRT network. Import inside ``trt_driver.named_device``."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
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

from sam3x.passes.attention.operators import TILED_ATTENTION
from sam3x.passes.graph.cond_graph import ASSERTIONS, COND

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
        form: str,
    ) -> None:
        self.form = form
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


MOST_TILES = 64
"""Of one attention where they stand one after another."""

# ---- attention in tiles of queries: TensorRT-RTX does not fuse it in float32, and all scores would be in memory


def fused(interpreter: Interpreter, query: Any, key: Any, value: Any, mask: Any | None) -> Any:
    """TensorRT's attention layer; the scale is already in the query, the mask is bool or numbers that are added."""
    net = interpreter.ctx.net
    layer = net.add_attention_v2(query, key, value, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE)
    if mask is not None:
        layer.mask = mask
    layer.decomposable = True  # where no kernel fits, as in float32
    layer.name = str(interpreter._cur_node_name)
    return layer.get_output(0)


def decomposed(interpreter: Interpreter, query: Any, key: Any, value: Any, mask: Any | None) -> Any:
    """softmax(query · keyᵀ + mask) · value, as the attention layer, which a loop does not take."""
    net = interpreter.ctx.net
    none, transposed = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE
    scores = net.add_matrix_multiply(query, none, key, transposed).get_output(0)
    if mask is not None and mask.dtype == trt.bool:
        hidden = constant(interpreter, np.full([1] * 4, -np.inf, np.float32))
        hidden = hidden if scores.dtype == trt.float32 else net.add_cast(hidden, scores.dtype).get_output(0)
        scores = net.add_select(mask, scores, hidden).get_output(0)
    elif mask is not None:
        scores = net.add_elementwise(scores, mask, trt.ElementWiseOperation.SUM).get_output(0)
    softmax = net.add_softmax(scores)
    softmax.axes = 1 << 3
    return net.add_matrix_multiply(softmax.get_output(0), none, value, none).get_output(0)


def constant(interpreter: Interpreter, value: np.ndarray) -> Any:
    """A constant; TensorRT reads the array when it builds, so the interpreter keeps it."""
    interpreter.held.append(value)
    return interpreter.ctx.net.add_constant(value.shape, trt.Weights(value)).get_output(0)


def tiled_attention(interpreter: Interpreter, args: Any, kwargs: Any) -> Any:
    """``ceil(N / rows)`` turns, in a loop or one after another; ``rows`` is the most queries whose scores fit half the budget,
    as scores and probabilities are there at once. Queries that fill up the last tile are zeros, and their answers are cut off.
    One after another, they are ``MOST_TILES`` at most: each is a part of the network."""
    query, key, value, mask, scale, budget = args
    net, name = interpreter.ctx.net, str(interpreter._cur_node_name)
    most = interpreter.largest(interpreter._cur_node.args[0]), interpreter.largest(interpreter._cur_node.args[1])  # type: ignore[union-attr]
    (batch, heads, tokens, _), keys = most[0], most[1][2]
    if interpreter.form == "tiles":
        budget = budget * 3 // 4  # the answers of all tiles wait to be joined, and the queries are there twice
    rows = max(1, min(tokens, budget // (2 * batch * heads * keys * 4)))
    tiles = {"loops": math.ceil(tokens / rows), "tiles": min(MOST_TILES, math.ceil(tokens / rows)), "products": 1}[
        interpreter.form
    ]
    rows = math.ceil(tokens / tiles)
    factor = constant(interpreter, np.full([1] * 4, scale, np.float32))
    factor = factor if query.dtype == trt.float32 else net.add_cast(factor, query.dtype).get_output(0)
    query = net.add_elementwise(query, factor, trt.ElementWiseOperation.PROD).get_output(0)
    if tiles == 1:
        # TensorRT-RTX 1.6 crashes on an attention layer beside conditionals, but in float16
        plain = interpreter.form == "products" or (interpreter.conditional and query.dtype != trt.float16)
        return (decomposed if plain else fused)(interpreter, query, key, value, mask)

    if interpreter.form == "tiles":
        return _unrolled(interpreter, query, key, value, mask, tiles, rows)
    loop = net.add_loop()
    loop.name = name
    count = constant(interpreter, np.array(tiles, np.int32))
    loop.add_trip_limit(count, trt.TripLimit.COUNT)
    tile = loop.add_iterator(_in_tiles(interpreter, query, tiles, rows), 2).get_output(0)
    rowwise = mask is not None and mask.shape[2] != 1
    own = loop.add_iterator(_in_tiles(interpreter, mask, tiles, rows), 2).get_output(0) if rowwise else mask
    order = loop.add_recurrence(constant(interpreter, np.zeros([1] * 4, np.float32)))
    turn = net.add_elementwise(tile, order.get_output(0), trt.ElementWiseOperation.SUM).get_output(0)
    answer = decomposed(interpreter, turn, key, value, own)
    order.set_input(1, _nothing(interpreter, answer))
    joined = loop.add_loop_output(answer, trt.LoopOutput.CONCATENATE, 2)
    joined.set_input(1, count)
    layer = net.add_shuffle(joined.get_output(0))
    layer.reshape_dims = (0, 0, tiles * rows, value.shape[3])  # 0: as before
    return _first_rows(interpreter, layer.get_output(0), query)


def _unrolled(interpreter: Interpreter, query: Any, key: Any, value: Any, mask: Any | None, tiles: int, rows: int) -> Any:
    """The turns of the loop one after another, each a part of the network."""
    net = interpreter.ctx.net
    rowwise = mask is not None and mask.shape[2] != 1
    padded = [_padded(interpreter, tensor, tiles * rows) for tensor in ((query, mask) if rowwise else (query,))]
    answers: list[Any] = []
    for index in range(tiles):
        tile, *own = (_rows(interpreter, tensor, index * rows, rows) for tensor in padded)
        if answers:
            tile = net.add_elementwise(tile, _nothing(interpreter, answers[-1]), trt.ElementWiseOperation.SUM).get_output(0)
        answers.append(decomposed(interpreter, tile, key, value, own[0] if rowwise else mask))
    joined = net.add_concatenation(answers)
    joined.axis = 2
    return _first_rows(interpreter, joined.get_output(0), query)


def _rows(interpreter: Interpreter, tensor: Any, start: int, rows: int) -> Any:
    """``tensor[:, :, start : start + rows]`` of a (B, H, N, D) tensor."""
    sizes = _sizes(interpreter, tensor)
    layer = interpreter.ctx.net.add_slice(tensor, (0, 0, start, 0), (0,) * 4, (1,) * 4)
    layer.set_input(2, _shape_tensor(interpreter, [*sizes[:2], rows, sizes[3]]))
    return layer.get_output(0)


def _nothing(interpreter: Interpreter, answer: Any) -> Any:
    """Zero, whatever the answer holds. Without it TensorRT takes the turns for independent and computes them all at once."""
    net = interpreter.ctx.net
    first = net.add_slice(answer, (0,) * 4, (1,) * 4, (1,) * 4).get_output(0)
    infinite = constant(interpreter, np.full([1] * 4, np.inf, np.float32))
    above = net.add_elementwise(first, infinite, trt.ElementWiseOperation.GREATER).get_output(0)
    return net.add_cast(above, trt.float32).get_output(0)


def _sizes(interpreter: Interpreter, tensor: Any) -> list[Any]:
    """Sizes of a tensor: an int, or a (1,) int64 tensor where it is known at run time only."""
    net = interpreter.ctx.net
    shape = None
    sizes: list[Any] = []
    for axis, size in enumerate(tensor.shape):
        if size >= 0:
            sizes.append(int(size))
            continue
        shape = shape or net.add_shape(tensor).get_output(0)
        sizes.append(net.add_slice(shape, (axis,), (1,), (1,)).get_output(0))
    return sizes


def _shape_tensor(interpreter: Interpreter, sizes: list[Any]) -> Any:
    net = interpreter.ctx.net
    parts = [constant(interpreter, np.array([x], np.int64)) if isinstance(x, int) else x for x in sizes]
    layer = net.add_concatenation(parts)
    layer.axis = 0
    return layer.get_output(0)


def _in_tiles(interpreter: Interpreter, tensor: Any, tiles: int, rows: int) -> Any:
    """(B, H, N, D) → (B, H, tiles, rows, D), zeros behind the last query."""
    layer = interpreter.ctx.net.add_shuffle(_padded(interpreter, tensor, tiles * rows))
    # 0: as before; only a mask's keys may be dynamic
    layer.reshape_dims = (0, 0, tiles, rows, tensor.shape[3])
    return layer.get_output(0)


def _padded(interpreter: Interpreter, tensor: Any, rows: int) -> Any:
    """(B, H, N, D) → (B, H, rows, D), zeros behind the last query."""
    if tensor.shape[2] == rows:
        return tensor
    sizes = _sizes(interpreter, tensor)
    layer = interpreter.ctx.net.add_slice(tensor, (0,) * 4, (0,) * 4, (1,) * 4)
    layer.set_input(2, _shape_tensor(interpreter, [*sizes[:2], rows, *sizes[3:]]))
    layer.mode = trt.SampleMode.FILL
    return layer.get_output(0)


def _first_rows(interpreter: Interpreter, tensor: Any, query: Any) -> Any:
    """As many rows as there are queries."""
    sizes, wanted = _sizes(interpreter, tensor), _sizes(interpreter, query)
    if sizes[2] == wanted[2]:
        return tensor
    layer = interpreter.ctx.net.add_slice(tensor, (0,) * 4, (0,) * 4, (1,) * 4)
    layer.set_input(2, _shape_tensor(interpreter, [*sizes[:2], wanted[2], sizes[3]]))
    return layer.get_output(0)


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
