"""``sam3x::tiled_attention`` in TensorRT: one attention layer in a loop over tiles of queries, so that the scores stay small.

TensorRT-RTX does not fuse attention in float32, and the scores of all queries would be in memory at once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorrt as trt

if TYPE_CHECKING:
    from sam3x.targets.trt_interpreter import Interpreter


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
    """A loop of ``ceil(N / rows)`` turns; ``rows`` is the most queries whose scores fit half the budget, as scores and
    probabilities are there at once. Queries that fill up the last tile are zeros, and their answers are cut off."""
    query, key, value, mask, scale, budget = args
    net, name = interpreter.ctx.net, str(interpreter._cur_node_name)
    most = interpreter.largest(interpreter._cur_node.args[0]), interpreter.largest(interpreter._cur_node.args[1])  # type: ignore[union-attr]
    (batch, heads, tokens, _), keys = most[0], most[1][2]
    rows = max(1, min(tokens, budget // (2 * batch * heads * keys * 4)))
    tiles = math.ceil(tokens / rows)
    rows = math.ceil(tokens / tiles)
    factor = constant(interpreter, np.full([1] * 4, scale, np.float32))
    factor = factor if query.dtype == trt.float32 else net.add_cast(factor, query.dtype).get_output(0)
    query = net.add_elementwise(query, factor, trt.ElementWiseOperation.PROD).get_output(0)
    if tiles == 1:
        # TensorRT-RTX 1.6 crashes on an attention layer beside conditionals, but in float16
        plain = interpreter.conditional and query.dtype != trt.float16
        return (decomposed if plain else fused)(interpreter, query, key, value, mask)

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
    sizes = [*_sizes(interpreter, query)[:2], tiles * rows, _sizes(interpreter, value)[3]]
    layer = net.add_shuffle(joined.get_output(0))
    layer.set_input(1, _shape_tensor(interpreter, sizes))
    return _first_rows(interpreter, layer.get_output(0), query)


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
    net = interpreter.ctx.net
    sizes = _sizes(interpreter, tensor)
    if tensor.shape[2] != tiles * rows:
        wanted = [*sizes[:2], tiles * rows, *sizes[3:]]
        layer = net.add_slice(tensor, (0,) * 4, (0,) * 4, (1,) * 4)
        layer.set_input(2, _shape_tensor(interpreter, wanted))
        layer.mode = trt.SampleMode.FILL
        tensor = layer.get_output(0)
    layer = net.add_shuffle(tensor)
    layer.set_input(1, _shape_tensor(interpreter, [*sizes[:2], tiles, rows, *sizes[3:]]))
    return layer.get_output(0)


def _first_rows(interpreter: Interpreter, tensor: Any, query: Any) -> Any:
    """As many rows as there are queries."""
    sizes, wanted = _sizes(interpreter, tensor), _sizes(interpreter, query)
    if sizes[2] == wanted[2]:
        return tensor
    layer = interpreter.ctx.net.add_slice(tensor, (0,) * 4, (0,) * 4, (1,) * 4)
    layer.set_input(2, _shape_tensor(interpreter, [*sizes[:2], wanted[2], sizes[3]]))
    return layer.get_output(0)
