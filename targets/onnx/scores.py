"""Attention in ONNX's own operators: all scores at once, or in a ``Loop`` over heads, tiles of queries, or both.

Masks are added and softmax is taken in float32, where the products are in float16 too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sam3x.targets.onnx.linear import opset
from sam3x.targets.onnx.loop import TILE_BYTES, Tiles, for_each, ints, largest_divisor

if TYPE_CHECKING:
    import onnx_ir as ir


SCORE_BYTES = 4
"""Of one score."""


def _scalar(value: float, like: ir.Value | None = None) -> ir.Value:
    """In the dtype of ``like``, else in float32."""
    import numpy as np
    import onnx_ir as ir

    op = opset()
    dtype = ir.DataType.FLOAT if like is None else _dtype(like)
    return op.Constant(value=ir.tensor(np.array(value, dtype=dtype.numpy())))


def _is_bool(mask: ir.Value) -> bool:
    import onnx_ir as ir

    return mask.dtype == ir.DataType.BOOL


def _scaled(query: ir.Value, scale: float) -> ir.Value:
    made = opset().Mul(query, _scalar(scale, query))
    made.dtype, made.shape = query.dtype, query.shape
    return made


def _swapped(key: ir.Value) -> ir.Value:
    """(…, S, D) → (…, D, S)."""
    import onnx_ir as ir

    rank = len(key.shape)  # type: ignore[arg-type]
    order = [*range(rank - 2), rank - 1, rank - 2]
    made = opset().Transpose(key, perm=order)
    made.dtype, made.shape = key.dtype, ir.Shape([key.shape[axis] for axis in order])  # type: ignore[index]
    return made


def _additive(mask: ir.Value) -> ir.Value:
    import onnx_ir as ir

    if not _is_bool(mask):
        return _cast(mask, ir.DataType.FLOAT)
    made = opset().Where(mask, _scalar(0.0), _scalar(-math.inf))
    made.dtype, made.shape = ir.DataType.FLOAT, mask.shape
    return made


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    if value.dtype == dtype:
        return value
    made = opset().Cast(value, to=dtype.value)
    made.dtype, made.shape = dtype, value.shape
    return made


def plain(query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value | None, scale: float) -> ir.Value:
    """(…, N, D), (…, S, D), (…, S, E), a mask that broadcasts to (…, N, S) → (…, N, E), all scores at once."""
    return _whole(_scaled(query, scale), _swapped(key), value, None if mask is None else _additive(mask))


def _whole(scaled: ir.Value, swapped: ir.Value, value: ir.Value, mask: ir.Value | None) -> ir.Value:
    """Scaled query (…, N, D), transposed key (…, D, S), value (…, S, E), float mask → (…, N, E)."""
    return _weighted(opset().MatMul(scaled, swapped), value, mask)


def _weighted(scores: ir.Value, value: ir.Value, mask: ir.Value | None) -> ir.Value:
    """Scores (…, N, S) in the dtype of value (…, S, E), float32 mask → (…, N, E)."""
    import onnx_ir as ir

    op, dtype = opset(), _dtype(value)
    scores.dtype = dtype
    scores = _cast(scores, ir.DataType.FLOAT)
    weights = op.Softmax(scores if mask is None else op.Add(scores, mask), axis=-1)
    weights.dtype = ir.DataType.FLOAT
    return op.MatMul(_cast(weights, dtype), value)


def scan(query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value | None, scale: float, budget: int) -> ir.Value:
    """As ``plain``, with at most ``budget`` bytes for scores and probabilities."""
    scaled = _scaled(query, scale)
    if mask is not None and not _varies(mask):
        mask = _additive(mask)
    if _head_by_head(query, key, value, mask):
        return _heads(scaled, key, value, mask, budget)
    return _tiled(scaled, _swapped(key), value, mask, budget)


def _tiled(scaled: ir.Value, swapped: ir.Value, value: ir.Value, mask: ir.Value | None, budget: int) -> ir.Value:
    """Scaled query (…, N, D), transposed key (…, D, S), value (…, S, E) → (…, N, E), a tile of queries at a time."""
    op = opset()
    rank = len(scaled.shape)  # type: ignore[arg-type]
    lead = op.Shape(scaled, start=0, end=rank - 2)
    scores = op.Mul(op.ReduceProd(lead, keepdims=1), op.Shape(swapped, start=rank - 1, end=rank))
    queries = op.Shape(scaled, start=rank - 2, end=rank - 1)
    tiles = Tiles(lead, queries, op.Mul(scores, ints(SCORE_BYTES)), budget, _dtype(scaled), rank=rank)
    return _in_tiles(tiles, scaled, swapped, value, mask, op.Shape(value, start=-1))


def _in_tiles(
    tiles: Tiles, scaled: ir.Value, swapped: ir.Value, value: ir.Value, mask: ir.Value | None, width: ir.Value
) -> ir.Value:
    """As ``_whole``, ``tiles`` of queries after each other; ``width``: E, (1,)."""
    op = opset()
    zero, hide = _scalar(0.0), _scalar(-math.inf)
    if mask is not None and not _is_bool(mask):
        mask = _additive(mask)

    def body(tile: Callable[[ir.Value, int], ir.Value]) -> ir.Value:
        scores = op.MatMul(tile(scaled, len(scaled.shape) - 2), swapped)  # type: ignore[arg-type]
        rows = None
        if mask is not None:
            rows = tile(mask, len(mask.shape) - 2) if _varies(mask) else mask  # type: ignore[arg-type]
            rows = op.Where(rows, zero, hide) if _is_bool(mask) else rows
        return _weighted(scores, value, rows)

    return tiles.run(body, width)


def _dtype(x: ir.Value) -> ir.DataType:
    assert x.dtype is not None
    return x.dtype


def _head_by_head(query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value | None) -> bool:
    """Whether heads can be taken one by one: all have the same sizes, and no mask of all pairs differs between them."""
    leads = [[str(dim) for dim in x.shape[:-2]] for x in (query, key, value)]  # type: ignore[index]
    if not leads[0] or any(lead != leads[0] for lead in leads):
        return False
    return mask is None or not _varies(mask) or all(dim == 1 for dim in mask.shape[:-2])  # type: ignore[index]


def _heads(scaled: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value | None, budget: int) -> ir.Value:
    """As ``_tiled`` of a key that is not transposed, head by head: many rows, little memory; all heads where that is small.

    Where the sizes are numbers and a head's scores fit, as in a window of a ViT, a step takes whole heads and no tiles.
    """
    import onnx_ir as ir

    op = opset()
    rank = len(scaled.shape)  # type: ignore[arg-type]
    lead, queries = op.Shape(scaled, start=0, end=rank - 2), op.Shape(scaled, start=rank - 2, end=rank - 1)
    width, tiles = op.Shape(value, start=-1), None
    few = _heads_that_fit(scaled, key, min(TILE_BYTES, budget // 2))
    if few:
        shape = ints(-1, few)
    else:
        heads, keys = op.ReduceProd(lead, keepdims=1), op.Shape(key, start=rank - 2, end=rank - 1)
        size = op.Mul(op.Mul(op.Mul(heads, queries), keys), ints(SCORE_BYTES))
        group = op.Where(op.LessOrEqual(size, ints(min(TILE_BYTES, budget // 2))), heads, ints(1))
        shape = op.Concat(op.Div(heads, group), group, axis=0)
        # made here, so that its arithmetic is done once and not for each head; a group of heads has scores for one tile
        row = op.Mul(op.Mul(group, keys), ints(SCORE_BYTES))
        tiles = Tiles(group, queries, row, budget, _dtype(scaled), rank=3, single=True)

    def grouped(x: ir.Value) -> ir.Value:
        made = op.Reshape(x, op.Concat(shape, op.Shape(x, start=-2), axis=0))
        made.dtype, made.shape = x.dtype, ir.Shape([None, few or None, *x.shape[-2:]])  # type: ignore[index]
        return made

    # transposed once grouped: OpenVINO throws on a dynamic size between two Reshapes (its ShuffleChannelsFusion)
    looped = [grouped(scaled), _swapped(grouped(key)), grouped(value)]
    if mask is not None and all(dim == 1 for dim in mask.shape[:-2]):  # type: ignore[index]
        mask = _of_all_heads(mask)
        mask = _additive(mask) if few else mask
    elif mask is not None:
        of_all = op.Expand(mask, op.Concat(lead, ints(1, 1), axis=0))
        of_all.dtype, of_all.shape = mask.dtype, ir.Shape([*scaled.shape[:-2], *mask.shape[-2:]])  # type: ignore[index]
        looped.insert(0, grouped(of_all))

    def one(*given: ir.Value) -> ir.Value:
        scaled, swapped, value = given[-3:]
        hidden = given[0] if len(given) > 3 else mask
        if tiles is not None:
            return _in_tiles(tiles, scaled, swapped, value, hidden, width)
        result: Any = _whole(scaled, swapped, value, None if hidden is None else _additive(hidden))
        result.dtype, result.shape = value.dtype, ir.Shape([few, *scaled.shape[-2:-1], *value.shape[-1:]])  # type: ignore[index]
        return result

    made = for_each(looped, one, "head")
    return op.Reshape(made, op.Concat(lead, queries, width, axis=0))


def _heads_that_fit(scaled: ir.Value, key: ir.Value, limit: int) -> int:
    """How many heads at a time keep their scores below ``limit`` bytes and divide all heads; 0 where sizes are not known."""
    queries, keys = scaled.shape[-2], key.shape[-2]  # type: ignore[index]
    if not isinstance(queries, int) or not isinstance(keys, int):
        return 0
    fit = limit // (queries * keys * SCORE_BYTES)
    known: int = math.prod(dim for dim in scaled.shape[:-2] if isinstance(dim, int))  # type: ignore[index, misc]
    return largest_divisor(known, fit)


def _of_all_heads(mask: ir.Value) -> ir.Value:
    """(1, …, 1, N or 1, S) → (N or 1, S)."""
    import onnx_ir as ir

    if len(mask.shape) == 2:  # type: ignore[arg-type]
        return mask
    op = opset()
    made = op.Reshape(mask, op.Shape(mask, start=-2))
    made.dtype, made.shape = mask.dtype, ir.Shape(mask.shape[-2:])  # type: ignore[index]
    return made


def _varies(mask: ir.Value) -> bool:
    """Whether rows of the mask differ: it has a dimension of queries."""
    rows = mask.shape[-2]  # type: ignore[index]
    return not (isinstance(rows, int) and rows == 1)
