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
from sam3x.passes.linear.tile_feed_forward import TILED_FEED_FORWARD

aten = torch.ops.aten

_FLOATS = {torch.float32: trt.float32, torch.float16: trt.float16, torch.bfloat16: trt.bfloat16}


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
        explicit: bool,
    ) -> None:
        self.form, self.explicit = form, explicit
        self.bounds = bounds
        self.held: list[Any] = []
        self.conditional = any(node.target is COND for node in module.graph.nodes)
        self.answer: Any = None
        self.independent = independent_products(module)
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
        outer = (self._cur_node, self._cur_node_name, self.module, self.answer)  # type: ignore[has-type]
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
            self._cur_node, self._cur_node_name, self.module, self.answer = outer
        raise AssertionError("a graph ends with its output")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        waits = self.answer is not None and self._cur_node in self.independent
        if waits and isinstance(args[0], trt.ITensor):
            args = (_plus(self, args[0], _nothing(self, self.answer)), *args[1:])
        own = CONVERTERS.get(target)
        return self._typed(super().call_function(target, args, kwargs) if own is None else own(self, args, kwargs))

    def _typed(self, value: Any) -> Any:
        """``value`` in the float type that torch has: some converters (``cumsum``'s) give float32 whatever they are given."""
        wanted = self._cur_node.meta.get("val")  # type: ignore[union-attr]
        if not isinstance(wanted, torch.Tensor) or not isinstance(value, trt.ITensor):
            return value
        kind = _FLOATS.get(wanted.dtype, value.dtype)
        return value if value.dtype == kind else self.ctx.net.add_cast(value, kind).get_output(0)


def independent_products(module: GraphModule) -> set[Node]:
    """Products of what no attention has a part in, as keys and values of the prompt. They wait for the last attention in tiles:
    for a parallel path to every layer TensorRT-RTX keeps, on Turing, two tensors of each layer to the end."""
    after: set[Node] = set()
    found = set()
    for node in module.graph.nodes:
        if node.target is TILED_ATTENTION or not after.isdisjoint(node.all_input_nodes):
            after.add(node)
        elif node.target is aten.linear.default:
            found.add(node)
    return found


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
    """``IIfConditional``: what a branch reads enters through an input layer, what both return leaves through an output one.

    TensorRT-RTX keeps what leaves in memory of its own for the whole run, so of ``layer_norm(x)`` or ``x`` only the mean and
    the variance leave.
    """
    predicate, true, false, operands = args
    net, name = self.ctx.net, str(self._cur_node_name)
    conditional = net.add_if_conditional()
    conditional.name = name
    conditional.set_condition(predicate)
    entered = [conditional.add_input(item).get_output(0) if isinstance(item, trt.ITensor) else item for item in operands]

    def output(values: Sequence[Any], kind: str) -> Any:
        ends = [
            net.add_identity(get_trt_tensor(self.ctx, value, f"{name}_{kind}")).get_output(0)
            if not isinstance(value, trt.ITensor) or value in entered
            else value
            for value in values
        ]
        layer = conditional.add_output(*ends)
        layer.name = f"{name}_output_{kind}"
        return layer.get_output(0)

    norm = _norm_or_not(true, false)
    if norm is not None and isinstance(operands[norm[1]], trt.ITensor):
        wanted, source, weight, bias, epsilon = norm
        x, order = operands[source], 1 if wanted else -1
        sides = (_moments(net, entered[source]), _no_moments(self, entered[source]))[::order]
        mean, variance = (output(ends, f"moment_{i}") for i, ends in enumerate(zip(*sides, strict=True)))
        scale, shift = (None if place is None else operands[place] for place in (weight, bias))
        normed = _normalized(self, x, mean, variance, scale, shift, epsilon)
        flag = net.add_shuffle(predicate)
        flag.reshape_dims = (1,) * len(x.shape)
        return (net.add_select(flag.get_output(0), *(normed, x)[::order]).get_output(0),)
    results = [self.branch(branch, entered, f"{name}_{index}") for index, branch in enumerate((true, false))]
    return tuple(output(pair, str(index)) for index, pair in enumerate(zip(*results, strict=True)))


def _norm_or_not(true: GraphModule, false: GraphModule) -> tuple[bool, int, int | None, int | None, float] | None:
    """Of branches that are ``layer_norm(x)`` over the last dimension and ``x``: whether it is the true one, the operands that
    are x, weight and bias, and epsilon. None of any others."""
    ends = []
    results: Any
    for branch in (true, false):
        places = {node: place for place, node in enumerate(branch.graph.find_nodes(op="placeholder"))}
        (results,) = branch.graph.output_node().args
        node = results[0] if len(results) == 1 else None
        while isinstance(node, Node) and node.target is aten.clone.default:
            node = node.args[0]
        ends.append((node, places))
    for wanted in (True, False):
        (norm, places), (other, others) = ends if wanted else ends[::-1]
        if not isinstance(norm, Node) or norm.target is not aten.layer_norm.default or other not in others:
            continue
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        values: dict[str, Any] = dict(zip(names, norm.args, strict=False)) | norm.kwargs
        x, weight, bias = (values.get(name) for name in ("input", "weight", "bias"))
        known = all(value is None or value in places for value in (x, weight, bias))
        if known and len(values["normalized_shape"]) == 1 and places[x] == others[other]:
            return wanted, places[x], places.get(weight), places.get(bias), values.get("eps", 1e-5)
    return None


def _moments(net: Any, x: Any) -> tuple[Any, Any]:
    """Mean and variance over the last dimension, in float32."""
    x = x if x.dtype == trt.float32 else net.add_cast(x, trt.float32).get_output(0)
    last = 1 << (len(x.shape) - 1)
    mean = net.add_reduce(x, trt.ReduceOperation.AVG, last, True).get_output(0)
    off = net.add_elementwise(x, mean, trt.ElementWiseOperation.SUB).get_output(0)
    square = net.add_elementwise(off, off, trt.ElementWiseOperation.PROD).get_output(0)
    return mean, net.add_reduce(square, trt.ReduceOperation.AVG, last, True).get_output(0)


def _no_moments(interpreter: Interpreter, x: Any) -> tuple[Any, Any]:
    """Of the shape and type of moments; nobody reads their numbers."""
    net, rank, kinds = interpreter.ctx.net, len(x.shape), trt.ElementWiseOperation
    layer = net.add_slice(x, (0,) * rank, (0,) * rank, (1,) * rank)
    layer.set_input(2, _shape_tensor(interpreter, [*_sizes(interpreter, x)[:-1], 1]))
    first = layer.get_output(0)
    first = first if x.dtype == trt.float32 else net.add_cast(first, trt.float32).get_output(0)
    none, one = (constant(interpreter, np.full([1] * rank, value, np.float32)) for value in (0, 1))
    mean = net.add_elementwise(first, none, kinds.PROD).get_output(0)
    return mean, net.add_elementwise(mean, one, kinds.SUM).get_output(0)


def _normalized(
    interpreter: Interpreter, x: Any, mean: Any, variance: Any, weight: Any | None, bias: Any | None, epsilon: float
) -> Any:
    """(x - mean) / sqrt(variance + epsilon) · weight + bias, computed in float32, in x's type."""
    net, kinds, ctx, name = interpreter.ctx.net, trt.ElementWiseOperation, interpreter.ctx, str(interpreter._cur_node_name)
    ones = [1] * (len(x.shape) - 1)
    small = constant(interpreter, np.full((*ones, 1), epsilon, np.float32))
    deviation = net.add_unary(net.add_elementwise(variance, small, kinds.SUM).get_output(0), trt.UnaryOperation.SQRT)
    wide = x if x.dtype == trt.float32 else net.add_cast(x, trt.float32).get_output(0)
    off = net.add_elementwise(wide, mean, kinds.SUB).get_output(0)
    result = net.add_elementwise(off, deviation.get_output(0), kinds.DIV).get_output(0)
    for value, kind, place in ((weight, kinds.PROD, "weight"), (bias, kinds.SUM, "bias")):
        if value is not None:
            value = get_trt_tensor(ctx, value, f"{name}_{place}")
            value = value if value.dtype == trt.float32 else net.add_cast(value, trt.float32).get_output(0)
            layer = net.add_shuffle(value)
            layer.reshape_dims = (*ones, value.shape[0])
            result = net.add_elementwise(result, layer.get_output(0), kind).get_output(0)
    return result if x.dtype == trt.float32 else net.add_cast(result, x.dtype).get_output(0)


def _getitem(self: Interpreter, args: Any, kwargs: Any) -> Any:
    return args[0][args[1]]


def _alias(self: Interpreter, args: Any, kwargs: Any) -> Any:
    return args[0]


MOST_TILES = 64
"""Of one attention or feed-forward block where they stand one after another."""
FEW_TILES = 4
"""That need no loop: with more than six loops in a network TensorRT-RTX crashes on some."""
TILE = 64 << 20
"""Bytes of a tile of a feed-forward block: of a hidden layer and what its activation gives."""

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
    """softmax(query · keyᵀ + mask) · value, as the attention layer, which a loop does not take; with ``--attention explicit``
    mask and softmax are in float32.
    """
    net = interpreter.ctx.net
    none, transposed = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE
    scores = net.add_matrix_multiply(query, none, key, transposed).get_output(0)
    if interpreter.explicit:
        scores, mask = _float32(net, scores), mask if mask is None or mask.dtype == trt.bool else _float32(net, mask)
    if mask is not None and mask.dtype == trt.bool:
        hidden = constant(interpreter, np.full([1] * 4, -np.inf, np.float32))
        hidden = hidden if scores.dtype == trt.float32 else net.add_cast(hidden, scores.dtype).get_output(0)
        scores = net.add_select(mask, scores, hidden).get_output(0)
    elif mask is not None:
        scores = net.add_elementwise(scores, mask, trt.ElementWiseOperation.SUM).get_output(0)
    softmax = net.add_softmax(scores)
    softmax.axes = 1 << 3
    weights = softmax.get_output(0)
    weights = weights if weights.dtype == value.dtype else net.add_cast(weights, value.dtype).get_output(0)
    return net.add_matrix_multiply(weights, none, value, none).get_output(0)


def _float32(net: Any, tensor: Any) -> Any:
    return tensor if tensor.dtype == trt.float32 else net.add_cast(tensor, trt.float32).get_output(0)


def constant(interpreter: Interpreter, value: np.ndarray) -> Any:
    """A constant; TensorRT reads the array when it builds, so the interpreter keeps it."""
    interpreter.held.append(value)
    return interpreter.ctx.net.add_constant(value.shape, trt.Weights(value)).get_output(0)


def tiled_attention(interpreter: Interpreter, args: Any, kwargs: Any) -> Any:
    """softmax(scale · query · keyᵀ + mask) · value, ``rows`` queries at a time: as many as keep scores and probabilities, which
    are there at once, within the budget. Queries that fill up the last tile are zeros, and their answers are cut off.

    In the form ``loops``, one image after another in a loop, and its tiles one after another in a turn (of one image alone, a
    tile a turn); in the form ``tiles``, tiles of all images, ``MOST_TILES`` at most, as each is a part of the network.
    """
    query, key, value, mask, scale, budget = args
    net = interpreter.ctx.net
    most = interpreter.largest(interpreter._cur_node.args[0]), interpreter.largest(interpreter._cur_node.args[1])  # type: ignore[union-attr]
    (batch, heads, tokens, _), keys = most[0], most[1][2]
    factor = constant(interpreter, np.full([1] * 4, scale, np.float32))
    factor = factor if query.dtype == trt.float32 else net.add_cast(factor, query.dtype).get_output(0)
    query = net.add_elementwise(query, factor, trt.ElementWiseOperation.PROD).get_output(0)
    row = 2 * heads * keys * 4  # bytes of one query's scores and probabilities
    if interpreter.form == "products" or batch * tokens * row <= budget:
        # TensorRT-RTX 1.6 crashes on an attention layer beside conditionals, but in float16
        crashes = interpreter.conditional and query.dtype != trt.float16
        plain = interpreter.form == "products" or interpreter.explicit or crashes
        return (decomposed if plain else fused)(interpreter, query, key, value, mask)
    tiles = _tile_count(tokens, budget // (batch * row))
    way: Callable[..., Any] = _tiles
    if interpreter.form == "loops" and tiles > FEW_TILES:
        way = _loop_of_tiles if query.shape[0] == 1 else _loop_of_images
        tiles = _tile_count(tokens, budget // row)
    if way is not _loop_of_tiles:
        tiles = min(MOST_TILES, tiles)
    rows = math.ceil(tokens / tiles)
    rowwise = mask is not None and mask.shape[2] != 1
    queries = _padded(interpreter, query, tiles * rows)
    mask = _padded(interpreter, mask, tiles * rows) if rowwise else mask
    interpreter.answer = _first_rows(interpreter, way(interpreter, queries, key, value, mask, rows), query)
    return interpreter.answer


def _tile_count(tokens: int, rows: int) -> int:
    """Of ``rows`` at most, and of one."""
    return math.ceil(tokens / max(1, min(tokens, rows)))


def _loop_of_tiles(interpreter: Interpreter, query: Any, key: Any, value: Any, mask: Any | None, rows: int) -> Any:
    net, tokens = interpreter.ctx.net, query.shape[2]
    loop = net.add_loop()
    loop.name = str(interpreter._cur_node_name)
    count = constant(interpreter, np.array(tokens // rows, np.int32))
    loop.add_trip_limit(count, trt.TripLimit.COUNT)

    def turn(tensor: Any) -> Any:
        layer = net.add_shuffle(tensor)
        layer.reshape_dims = (0, 0, tokens // rows, rows, tensor.shape[3])  # 0: as before; only a mask's keys may be dynamic
        return loop.add_iterator(layer.get_output(0), 2).get_output(0)

    order = loop.add_recurrence(constant(interpreter, np.zeros([1] * 4, np.float32)))
    own = turn(mask) if mask is not None and mask.shape[2] != 1 else mask
    answer = decomposed(interpreter, _plus(interpreter, turn(query), order.get_output(0)), key, value, own)
    order.set_input(1, _nothing(interpreter, answer))
    joined = loop.add_loop_output(answer, trt.LoopOutput.CONCATENATE, 2)
    joined.set_input(1, count)
    layer = net.add_shuffle(joined.get_output(0))
    layer.reshape_dims = (0, 0, tokens, value.shape[3])
    return layer.get_output(0)


def _loop_of_images(interpreter: Interpreter, query: Any, key: Any, value: Any, mask: Any | None, rows: int) -> Any:
    """Each turn static where only the number of images is not: TensorRT-RTX crashes on loops with a dynamic batch in them."""
    net = interpreter.ctx.net
    loop = net.add_loop()
    loop.name = str(interpreter._cur_node_name)
    images = _sizes(interpreter, query)[0]
    if isinstance(images, int):
        count = constant(interpreter, np.array(images, np.int32))
    else:
        layer = net.add_shuffle(net.add_cast(images, trt.int32).get_output(0))
        layer.reshape_dims = ()
        count = layer.get_output(0)
    loop.add_trip_limit(count, trt.TripLimit.COUNT)
    first = constant(interpreter, np.zeros(1, np.int64))

    def turn(tensor: Any) -> Any:
        if tensor is None or tensor.shape[0] == 1:
            return tensor
        return net.add_unsqueeze(loop.add_iterator(tensor).get_output(0), first).get_output(0)

    order = loop.add_recurrence(constant(interpreter, np.zeros([1] * 4, np.float32)))
    answer = _tiles(interpreter, turn(query), turn(key), turn(value), turn(mask), rows, order.get_output(0))
    order.set_input(1, _nothing(interpreter, answer))
    joined = loop.add_loop_output(net.add_squeeze(answer, first).get_output(0), trt.LoopOutput.CONCATENATE, 0)
    joined.set_input(1, count)
    return joined.get_output(0)


def _tiles(
    interpreter: Interpreter, query: Any, key: Any, value: Any, mask: Any | None, rows: int, order: Any | None = None
) -> Any:
    """Tiles one after another, each a part of the network; ``order``: a zero that the first waits for."""
    answers: list[Any] = []
    for start in range(0, query.shape[2], rows):
        tile = _rows(interpreter, query, start, rows)
        own = _rows(interpreter, mask, start, rows) if mask is not None and mask.shape[2] != 1 else mask
        order = _nothing(interpreter, answers[-1]) if answers else order
        tile = tile if order is None else _plus(interpreter, tile, order)
        answers.append(decomposed(interpreter, tile, key, value, own))
    return _joined(interpreter, answers)


def tiled_feed_forward(interpreter: Interpreter, args: Any, kwargs: Any) -> Any:
    """``linear``, activation, ``linear`` on as many rows at a time as keep the hidden layer, there twice, within ``TILE``."""
    x, weight1, bias1, activation, weight2, bias2 = args
    name, node = str(interpreter._cur_node_name), interpreter._cur_node
    *lead, tokens, _ = interpreter.largest(node.args[0])  # type: ignore[union-attr]
    hidden = 2 * math.prod(lead) * tokens * weight1.shape[0] * node.meta["val"].element_size()  # type: ignore[union-attr]
    tiles = min(MOST_TILES, tokens, math.ceil(hidden / TILE))
    rows = math.ceil(tokens / tiles)

    def linear(value: Any, weight: Any, bias: Any, place: str) -> Any:
        return impl.linear.linear(interpreter.ctx, aten.linear.default, None, f"{name}_{place}", value, weight, bias)

    padded = _padded(interpreter, x, tiles * rows)
    answers: list[Any] = []
    for start in range(0, tiles * rows, rows):
        tile = padded if tiles == 1 else _rows(interpreter, padded, start, rows)
        tile = _plus(interpreter, tile, _nothing(interpreter, answers[-1])) if answers else tile
        inner = _activated(interpreter, linear(tile, weight1, bias1, f"{start}_1"), activation)
        answers.append(linear(inner, weight2, bias2, f"{start}_2"))
    return _first_rows(interpreter, _joined(interpreter, answers), x)


_ACTIVATIONS = {"relu": "RELU", "gelu": "GELU_ERF", "gelu_tanh": "GELU_TANH", "silu": "SIGMOID"}
"""Names of ``tile_feed_forward`` → ``trt.ActivationType``; silu is x · sigmoid(x)."""


def _activated(interpreter: Interpreter, value: Any, activation: str) -> Any:
    net = interpreter.ctx.net
    result = net.add_activation(value, getattr(trt.ActivationType, _ACTIVATIONS[activation])).get_output(0)
    if activation == "silu":
        result = net.add_elementwise(value, result, trt.ElementWiseOperation.PROD).get_output(0)
    return result


def _plus(interpreter: Interpreter, tensor: Any, zero: Any) -> Any:
    net = interpreter.ctx.net
    zero = zero if zero.dtype == tensor.dtype else net.add_cast(zero, tensor.dtype).get_output(0)
    shape = (1,) * len(tensor.shape)
    if len(zero.shape) != len(shape):
        layer = net.add_shuffle(zero)
        layer.reshape_dims = shape
        zero = layer.get_output(0)
    return net.add_elementwise(tensor, zero, trt.ElementWiseOperation.SUM).get_output(0)


def _joined(interpreter: Interpreter, parts: list[Any]) -> Any:
    """Along the rows."""
    layer = interpreter.ctx.net.add_concatenation(parts)
    layer.axis = len(parts[0].shape) - 2
    return layer.get_output(0)


def _rows(interpreter: Interpreter, tensor: Any, start: int, rows: Any) -> Any:
    """``tensor[…, start : start + rows, :]``, zeros behind the last."""
    *lead, there, width = _sizes(interpreter, tensor)
    rank = len(tensor.shape)
    layer = interpreter.ctx.net.add_slice(tensor, (*[0] * (rank - 2), start, 0), (0,) * rank, (1,) * rank)
    if all(isinstance(size, int) for size in (*lead, rows, width)):
        layer.shape = (*lead, rows, width)
    else:
        layer.set_input(2, _shape_tensor(interpreter, [*lead, rows, width]))
    if not isinstance(there, int) or (isinstance(rows, int) and start + rows > there):
        layer.mode = trt.SampleMode.FILL
    return layer.get_output(0)


def _nothing(interpreter: Interpreter, answer: Any) -> Any:
    """Zero, whatever the answer holds. Without it TensorRT takes the turns for independent and computes them all at once."""
    net = interpreter.ctx.net
    one = (1,) * len(answer.shape)
    first = net.add_slice(answer, (0,) * len(one), one, one).get_output(0)
    infinite = constant(interpreter, np.full(one, np.inf, np.float32))
    infinite = infinite if first.dtype == trt.float32 else net.add_cast(infinite, first.dtype).get_output(0)
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


def _padded(interpreter: Interpreter, tensor: Any, rows: int) -> Any:
    """(…, N, D) → (…, rows, D), zeros behind the last of N."""
    return tensor if tensor.shape[-2] == rows else _rows(interpreter, tensor, 0, rows)


def _first_rows(interpreter: Interpreter, tensor: Any, like: Any) -> Any:
    """As many rows as ``like`` has."""
    wanted = _sizes(interpreter, like)[-2]
    return tensor if tensor.shape[-2] == wanted else _rows(interpreter, tensor, 0, wanted)


CONVERTERS: dict[Any, Callable[[Interpreter, Any, Any], Any]] = {
    aten.layer_norm.default: _layer_norm,
    aten.full_like.default: _full_like,
    aten.clone.default: _alias,
    aten.alias.default: _alias,
    aten.detach.default: _alias,
    operator.getitem: _getitem,
    COND: _cond,
    TILED_ATTENTION: tiled_attention,
    TILED_FEED_FORWARD: tiled_feed_forward,
    **dict.fromkeys(ASSERTIONS, lambda self, args, kwargs: None),
}
"""Operator → converter."""
