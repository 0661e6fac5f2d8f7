"""ONNX for ``sam3x::tiled_attention`` (a ``Scan`` over tiles of queries) and ``sam3x::multi_head_attention``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sam3x.targets.onnx_linear import opset
from sam3x.targets.onnx_loop import TILE_BYTES, Tiles, for_each, ints, node

if TYPE_CHECKING:
    import onnx_ir as ir

    from sam3x.passes.base import Pass
    from sam3x.program import CapturedProgram

CONTRIB = "com.microsoft"
LOWEST = -3.4028234663852886e38


def passes(mode: str, budget: int) -> tuple[Pass, ...]:
    """What lowers canonical attention for ``--attention mode``."""
    from sam3x.passes.decompose_attention import DecomposeAttentionPass
    from sam3x.passes.fuse_multi_head_attention import FuseMultiHeadAttentionPass
    from sam3x.passes.simplify_attention_masks import SimplifyAttentionMasksPass
    from sam3x.passes.sink_permutes import SinkPermutesPass
    from sam3x.passes.tile_attention import TileAttentionPass

    if mode == "decomposed":
        return (DecomposeAttentionPass(),)
    fused = (FuseMultiHeadAttentionPass(budget),) if mode == "ort" else ()
    return (SimplifyAttentionMasksPass(), *fused, SinkPermutesPass(), TileAttentionPass(budget), DecomposeAttentionPass())


def operators() -> set[Any]:
    """The operators that ``register`` teaches."""
    from sam3x.passes.attention_ops import MULTI_HEAD_ATTENTION, TILED_ATTENTION

    return {MULTI_HEAD_ATTENTION, TILED_ATTENTION}


def domains(mode: str) -> dict[str, int]:
    """Operator domains beside ONNX's own, and their versions, that a file of this mode may import."""
    return {CONTRIB: 1} if mode == "ort" else {}


def _bounds(captured: CapturedProgram) -> dict[str, float]:
    """Symbol → the largest value it may take; a size that tracing found no name for is dac's half."""
    spec = captured.spec
    if captured.ranges:
        return defaultdict(lambda: math.inf, {s: captured.ranges[meaning][1] for s, meaning in captured.dim_names.items()})
    upper: dict[str, float] = {"batch": spec.batch[1], "tokens": spec.halved_range[1], "prompt_length": spec.prompt_length[1]}
    bounds = {symbol: upper[meaning] for symbol, meaning in captured.dim_names.items()}
    halved = ("batch", "tokens")[spec.dac_dim]
    return defaultdict(lambda: upper[halved], bounds)


def register(registry: Any, captured: CapturedProgram) -> None:
    """Teach torch's converter (an ``ONNXRegistry``) the two operators, for the sizes that ``captured`` allows."""
    from torch.onnx._internal.exporter._registration import OnnxDecompMeta

    from sam3x.passes.attention_ops import MULTI_HEAD_ATTENTION, TILED_ATTENTION

    largest = _bounds(captured)

    def tiled(query: Any, key: Any, value: Any, mask: Any, scale: float, budget: int) -> Any:
        if _score_bytes(query.dtype, (*query.shape[:-1], key.shape[-2]), largest) <= budget:
            return _plain(query, key, value, mask, scale)
        return _scan(query, key, value, mask, scale, budget)

    def packed(query: Any, key: Any, value: Any, key_mask: Any, bias: Any, num_heads: int, scale: float, budget: int) -> Any:
        size = _score_bytes(query.dtype, (*query.shape[:2], num_heads, key.shape[1]), largest)
        return _multi_head(query, key, value, key_mask, bias, num_heads, scale, size > budget, budget)

    for target, function in ((TILED_ATTENTION, tiled), (MULTI_HEAD_ATTENTION, packed)):
        registry._register(  # register_op infers a signature from annotations, and warns that it cannot
            target,
            OnnxDecompMeta(
                onnx_function=function, fx_target=target, signature=None, is_custom=True, skip_signature_inference=True
            ),
        )


def _score_bytes(dtype: ir.DataType, sizes: Sequence[Any], largest: Mapping[str, float]) -> float:
    """The most bytes the scores can take; ∞ where a size has no known bound."""
    return math.prod(_largest(size, largest) for size in sizes) * dtype.itemsize


def _largest(dim: Any, largest: Mapping[str, float]) -> float:
    if isinstance(dim, int):
        return dim
    import sympy

    expression = sympy.sympify(str(dim.value).replace("//", "/"))
    known = {symbol: largest[str(symbol)] for symbol in expression.free_symbols}
    # sizes are sums and products of counts, with a half now and then: largest where its symbols are
    value = expression.subs(known)
    return float(value) if value.is_number and expression.is_polynomial(*known) else math.inf


def _scalar(value: float, like: ir.Value) -> ir.Value:
    import numpy as np
    import onnx_ir as ir

    op = opset()
    assert like.dtype is not None
    return op.Constant(value=ir.tensor(np.array(value, dtype=like.dtype.numpy())))


def _is_bool(mask: ir.Value) -> bool:
    import onnx_ir as ir

    return mask.dtype == ir.DataType.BOOL


def _scaled_and_swapped(query: ir.Value, key: ir.Value, scale: float) -> tuple[ir.Value, ir.Value]:
    """Scaled query, transposed key."""
    import onnx_ir as ir

    op = opset()
    rank = len(key.shape)  # type: ignore[arg-type]
    order = [*range(rank - 2), rank - 1, rank - 2]
    scaled, swapped = op.Mul(query, _scalar(scale, query)), op.Transpose(key, perm=order)
    scaled.dtype, scaled.shape = query.dtype, query.shape
    swapped.dtype, swapped.shape = key.dtype, ir.Shape([key.shape[axis] for axis in order])  # type: ignore[index]
    return scaled, swapped


def _additive(mask: ir.Value, like: ir.Value) -> ir.Value:
    op = opset()
    if not _is_bool(mask):
        return mask
    made = op.Where(mask, _scalar(0.0, like), _scalar(-math.inf, like))
    made.dtype, made.shape = like.dtype, mask.shape
    return made


def _plain(query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value | None, scale: float) -> ir.Value:
    op = opset()
    scaled, swapped = _scaled_and_swapped(query, key, scale)
    scores = op.MatMul(scaled, swapped)
    if mask is not None:
        scores = op.Add(scores, _additive(mask, query))
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _scan(query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value | None, scale: float, budget: int) -> ir.Value:
    """(…, N, D), (…, S, D), (…, S, E) → (…, N, E)."""
    scaled, swapped = _scaled_and_swapped(query, key, scale)
    if mask is not None and not _varies(mask):
        mask = _additive(mask, query)
    if _head_by_head(query, key, value, mask):
        return _heads(scaled, swapped, value, mask, budget)
    return _tiled(scaled, swapped, value, mask, budget)


def _tiled(scaled: ir.Value, swapped: ir.Value, value: ir.Value, mask: ir.Value | None, budget: int) -> ir.Value:
    """Scaled query (…, N, D), transposed key (…, D, S), value (…, S, E) → (…, N, E), a tile of queries at a time."""
    op = opset()
    rank = len(scaled.shape)  # type: ignore[arg-type]
    lead = op.ReduceProd(op.Shape(scaled, start=0, end=rank - 2), keepdims=1)
    tiles = Tiles(scaled, rank - 2, op.Mul(lead, op.Shape(swapped, start=rank - 1, end=rank)), budget)
    zero, hide = _scalar(0.0, scaled), _scalar(-math.inf, scaled)

    def body(tile: Callable[[ir.Value, int], ir.Value]) -> ir.Value:
        scores = op.MatMul(tile(scaled, rank - 2), swapped)
        if mask is not None:
            rows = tile(mask, len(mask.shape) - 2) if _varies(mask) else mask  # type: ignore[arg-type]
            scores = op.Add(scores, op.Where(rows, zero, hide) if _is_bool(mask) else rows)
        return op.MatMul(op.Softmax(scores, axis=-1), value)

    return tiles.run(body, op.Shape(value, start=-1))


def _head_by_head(query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value | None) -> bool:
    """Whether heads can be taken one by one: all have the same sizes, and no mask of all pairs differs between them."""
    leads = [[str(dim) for dim in x.shape[:-2]] for x in (query, key, value)]  # type: ignore[index]
    if not leads[0] or any(lead != leads[0] for lead in leads):
        return False
    return mask is None or not _varies(mask) or all(dim == 1 for dim in mask.shape[:-2])  # type: ignore[index]


def _heads(scaled: ir.Value, swapped: ir.Value, value: ir.Value, mask: ir.Value | None, budget: int) -> ir.Value:
    """As ``_tiled``, head by head, so that a tile has many rows and little memory; all heads at once where that is small."""
    import onnx_ir as ir

    op = opset()
    rank = len(scaled.shape)  # type: ignore[arg-type]
    lead = op.Shape(scaled, start=0, end=rank - 2)
    heads = op.ReduceProd(lead, keepdims=1)
    queries, keys = op.Shape(scaled, start=rank - 2, end=rank - 1), op.Shape(swapped, start=rank - 1)
    size = op.Mul(op.Mul(op.Mul(heads, queries), keys), ints(int(scaled.dtype.itemsize)))  # type: ignore[union-attr]
    group = op.Where(op.LessOrEqual(size, ints(min(TILE_BYTES, budget // 2))), heads, ints(1))
    count = op.Div(heads, group)

    def grouped(x: ir.Value) -> ir.Value:
        made = op.Reshape(x, op.Concat(count, group, op.Shape(x, start=-2), axis=0))
        made.dtype, made.shape = x.dtype, ir.Shape([None, None, *x.shape[-2:]])  # type: ignore[index]
        return made

    looped = [grouped(x) for x in (scaled, swapped, value)]
    if mask is not None and all(dim == 1 for dim in mask.shape[:-2]):  # type: ignore[index]
        mask = _of_all_heads(mask)
    elif mask is not None:
        of_all = op.Expand(mask, op.Concat(lead, ints(1, 1), axis=0))
        of_all.dtype, of_all.shape = mask.dtype, ir.Shape([*scaled.shape[:-2], *mask.shape[-2:]])  # type: ignore[index]
        looped.append(grouped(of_all))

    def one(scaled: ir.Value, swapped: ir.Value, value: ir.Value, own: ir.Value | None = None) -> ir.Value:
        return _tiled(scaled, swapped, value, mask if own is None else own, budget)

    made = for_each(looped, one, "head")
    return op.Reshape(made, op.Concat(lead, queries, op.Shape(value, start=-1), axis=0))


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


def _multi_head(
    query: Any, key: Any, value: Any, key_mask: Any, bias: Any, num_heads: int, scale: float, large: bool, budget: int
) -> Any:
    """Inputs of MultiHeadAttention: query, key, value, bias of the projections, key padding mask (1 = visible), scores' bias.

    ONNX Runtime keeps all scores where there is a mask: then, if they may be ``large``, it gets a tile of queries at a time.
    """
    import onnx_ir as ir

    op = opset()
    padding = None if key_mask is None else op.Cast(key_mask, to=ir.DataType.INT32)
    attributes = {"num_heads": num_heads, "scale": float(scale), "mask_filter_value": LOWEST}

    def inputs(rows: ir.Value, of_bias: ir.Value | None) -> list[ir.Value | None]:
        given = [rows, key, value, None, padding, of_bias]
        return given[: max(at for at, item in enumerate(given) if item is not None) + 1]

    if not large or (key_mask is None and bias is None):
        return node("MultiHeadAttention", inputs(query, bias), domain=CONTRIB, version=1, **attributes)
    scores = op.Mul(op.Mul(op.Shape(query, start=0, end=1), ints(num_heads)), op.Shape(key, start=1, end=2))

    def body(tile: Callable[[ir.Value, int], ir.Value]) -> ir.Value:
        given = inputs(tile(query, 1), None if bias is None else tile(bias, 2))
        return node("MultiHeadAttention", given, domain=CONTRIB, version=1, **attributes)

    return Tiles(query, 1, scores, budget).run(body, op.Shape(value, start=-1))
