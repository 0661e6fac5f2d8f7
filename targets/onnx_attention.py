"""ONNX for ``sam3x::tiled_attention`` (a ``Scan`` over tiles of queries) and ``sam3x::multi_head_attention``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sam3x.targets.onnx_linear import opset

if TYPE_CHECKING:
    import onnx_ir as ir

    from sam3x.passes.base import Pass
    from sam3x.program import CapturedProgram

CONTRIB = "com.microsoft"
TILE_BYTES = 16 << 20
"""Scores of one tile, where the budget leaves a choice: about what stays in the last-level cache."""
TILE_ROWS = 96
"""Fewest queries of a tile, where the budget leaves a choice: below, the products lose more than the cache gains."""
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


def _node(op_type: str, inputs: Sequence[Any], *, domain: str = "", version: int | None = 18, **attributes: Any) -> ir.Node:
    import onnx_ir as ir

    return ir.node(op_type, inputs, attributes=attributes or None, domain=domain, version=version)


def _record(node: ir.Node) -> ir.Value:
    """Put a node made by hand among those the converter records."""
    from torch.onnx._internal.exporter import _core

    assert _core.current_tracer is not None
    _core.current_tracer.nodes.append(node)
    return node.outputs[0]


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
    op = opset()
    rank = len(query.shape)  # type: ignore[arg-type]
    order = [*range(rank - 2), rank - 1, rank - 2]
    scaled, swapped = op.Mul(query, _scalar(scale, query)), op.Transpose(key, perm=order)
    scaled.dtype, scaled.shape = query.dtype, query.shape
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
    op = opset()
    rank = len(query.shape)  # type: ignore[arg-type]
    lead = op.ReduceProd(op.Shape(query, start=0, end=rank - 2), keepdims=1)
    tiles = _Tiles(query, rank - 2, op.Mul(lead, op.Shape(key, start=rank - 2, end=rank - 1)), budget)
    scaled, swapped = _scaled_and_swapped(query, key, scale)
    if mask is not None and not _varies(mask):
        mask = _additive(mask, query)
    zero, hide = _scalar(0.0, query), _scalar(-math.inf, query)

    def body(tile: Callable[[ir.Value, int], ir.Value], add: Callable[..., ir.Value]) -> ir.Value:
        scores = add("MatMul", tile(scaled, rank - 2), swapped)
        if mask is not None:
            rows = tile(mask, len(mask.shape) - 2) if _varies(mask) else mask  # type: ignore[arg-type]
            scores = add("Add", scores, add("Where", rows, zero, hide) if _is_bool(mask) else rows)
        return add("MatMul", add("Softmax", scores, axis=-1), value)

    return tiles.run(body, value)


def _varies(mask: ir.Value) -> bool:
    """Whether rows of the mask differ: it has a dimension of queries."""
    rows = mask.shape[-2]  # type: ignore[index]
    return not (isinstance(rows, int) and rows == 1)


class _Tiles:
    """A loop over tiles of queries; how many rows a tile has is worked out at run time.

    The last tile is as long as the others and overlaps the one before it, so that nothing is padded.

    Args:
        query: (…, N, …), N at dimension ``axis``.
        scores: how many scores a query has, (1,).
        budget: bytes that the scores may take.
    """

    def __init__(self, query: ir.Value, axis: int, scores: ir.Value, budget: int) -> None:
        op = opset()
        self.query, self.axis = query, axis
        one = _ints(1)
        self.queries = op.Shape(query, start=axis, end=axis + 1)
        row = op.Mul(scores, _ints(int(query.dtype.itemsize)))  # type: ignore[union-attr]
        allowed = op.Div(_ints(budget // 2), row)  # scores and probabilities of a tile are there at once
        wanted = op.Max(op.Div(_ints(TILE_BYTES), row), _ints(TILE_ROWS))
        rows = op.Max(op.Min(allowed, wanted, self.queries), one)
        self.count = op.Div(op.Sub(op.Add(self.queries, rows), one), rows)
        self.rows = op.Div(op.Sub(op.Add(self.queries, self.count), one), self.count)  # evenly

    def run(self, body: Callable[..., ir.Value], value: ir.Value) -> ir.Value:
        """Call ``body(tile, add)`` once, to build the loop's graph.

        ``tile(x, axis)`` is the part of ``x`` that belongs to the tile, ``add(op_type, *inputs, **attributes)`` makes a node.
        """
        import onnx_ir as ir

        op = opset()
        one, axis, rank = _ints(1), _ints(self.axis), len(self.query.shape)  # type: ignore[arg-type]
        index = op.Range(op.Constant(value_int=0), op.Squeeze(self.count), op.Constant(value_int=1))
        starts = op.Unsqueeze(op.Min(op.Mul(index, self.rows), op.Sub(self.queries, self.rows)), one)
        axes: dict[int, ir.Value] = {}
        start = ir.Value(name="tile_start", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
        nodes: list[ir.Node] = []

        def add(op_type: str, *inputs: Any, domain: str = "", version: int = 18, **attributes: Any) -> ir.Value:
            nodes.append(_node(op_type, inputs, domain=domain, version=version, **attributes))
            nodes[-1].outputs[0].name = f"tile_{op_type.lower()}_{len(nodes)}"
            return nodes[-1].outputs[0]

        end = add("Add", start, self.rows)

        def tile(x: ir.Value, dim: int) -> ir.Value:
            if dim not in axes:
                axes[dim] = _ints(dim)
            return add("Slice", x, start, end, axes[dim])

        output = body(tile, add)
        output.type = ir.TensorType(self.query.dtype)  # type: ignore[arg-type]
        output.shape = ir.Shape([None] * rank)
        graph = ir.Graph([start], [output], nodes=nodes, name="tile")
        made = _record(_node("Scan", [starts], body=graph, num_scan_inputs=1, scan_output_axes=[self.axis]))
        total, before = op.Mul(self.count, self.rows), op.Mul(op.Sub(self.count, one), self.rows)
        shape = [op.Shape(self.query, start=0, end=self.axis), total]
        if self.axis + 2 < rank:
            shape.append(op.Shape(self.query, start=self.axis + 1, end=rank - 1))
        joined = op.Reshape(made, op.Concat(*shape, op.Shape(value, start=rank - 1), axis=0))
        last = op.Slice(joined, op.Sub(total, op.Sub(self.queries, before)), total, axis)
        return op.Concat(op.Slice(joined, _ints(0), before, axis), last, axis=self.axis)


def _ints(*values: int) -> ir.Value:
    op = opset()
    return op.Constant(value_ints=[int(value) for value in values])


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
        return _record(_node("MultiHeadAttention", inputs(query, bias), domain=CONTRIB, version=1, **attributes))
    scores = op.Mul(op.Mul(op.Shape(query, start=0, end=1), _ints(num_heads)), op.Shape(key, start=1, end=2))

    def body(tile: Callable[[ir.Value, int], ir.Value], add: Callable[..., ir.Value]) -> ir.Value:
        given = inputs(tile(query, 1), None if bias is None else tile(bias, 2))
        return add("MultiHeadAttention", *given, domain=CONTRIB, version=1, **attributes)

    return _Tiles(query, 1, scores, budget).run(body, value)
