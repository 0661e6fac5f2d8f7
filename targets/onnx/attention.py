"""ONNX for ``sam3x::tiled_attention`` (a ``Loop`` over tiles of queries) and ``sam3x::multi_head_attention``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sam3x.targets.onnx.linear import opset
from sam3x.targets.onnx.loop import Tiles, ints, node
from sam3x.targets.onnx.scores import SCORE_BYTES, plain, scan

if TYPE_CHECKING:
    import onnx_ir as ir

    from sam3x.capture.program import CapturedProgram
    from sam3x.passes.base import Pass

CONTRIB = "com.microsoft"


def passes(mode: str, budget: int, precision: Sequence[Pass] = ()) -> tuple[Pass, ...]:
    """What lowers canonical attention for ``--attention mode``; ``precision``: passes that make the graph one below float32."""
    from sam3x.passes.attention.decompose_attention import DecomposeAttentionPass
    from sam3x.passes.attention.fuse_multi_head_attention import FuseMultiHeadAttentionPass
    from sam3x.passes.attention.simplify_attention_masks import SimplifyAttentionMasksPass
    from sam3x.passes.attention.tile_attention import TileAttentionPass
    from sam3x.passes.attention.unweave_channels import UnweaveChannelsPass
    from sam3x.passes.linear.sink_permutes import SinkPermutesPass
    from sam3x.passes.linear.split_linears import SplitLinearsPass

    decompose = DecomposeAttentionPass(float32_softmax=True)
    if mode == "decomposed":
        return (*precision, decompose)
    fused = (FuseMultiHeadAttentionPass(budget),) if mode == "ort" else ()
    return (
        SimplifyAttentionMasksPass(),
        *precision,
        *fused,
        SplitLinearsPass(),
        UnweaveChannelsPass(),
        SinkPermutesPass(),
        TileAttentionPass(budget),
        decompose,
    )


def operators() -> set[Any]:
    """The operators that ``register`` teaches."""
    from sam3x.passes.attention.operators import MULTI_HEAD_ATTENTION, TILED_ATTENTION

    return {MULTI_HEAD_ATTENTION, TILED_ATTENTION}


def domains(mode: str) -> dict[str, int]:
    """Operator domains beside ONNX's own, and their versions, that a file of this mode may import."""
    return {CONTRIB: 1} if mode == "ort" else {}


def _bounds(captured: CapturedProgram) -> dict[str, float]:
    """Symbol → the largest value it may take; a size that tracing found no name for is dac's half."""
    upper = captured.ranges[captured.halved][1] if captured.halved else math.inf
    return defaultdict(lambda: upper, {symbol: captured.ranges[meaning][1] for symbol, meaning in captured.dim_names.items()})


def register(registry: Any, captured: CapturedProgram) -> None:
    """Teach torch's converter (an ``ONNXRegistry``) the two operators, for the sizes that ``captured`` allows."""
    from torch.onnx._internal.exporter._registration import OnnxDecompMeta

    from sam3x.passes.attention.operators import MULTI_HEAD_ATTENTION, TILED_ATTENTION

    largest = _bounds(captured)

    def tiled(query: Any, key: Any, value: Any, mask: Any, scale: float, budget: int) -> Any:
        if _score_bytes((*query.shape[:-1], key.shape[-2]), largest) <= budget:
            return plain(query, key, value, mask, scale)
        return scan(query, key, value, mask, scale, budget)

    def packed(query: Any, key: Any, value: Any, key_mask: Any, bias: Any, num_heads: int, scale: float, budget: int) -> Any:
        size = _score_bytes((*query.shape[:2], num_heads, key.shape[1]), largest)
        return _multi_head(query, key, value, key_mask, bias, num_heads, scale, size > budget, budget)

    for target, function in ((TILED_ATTENTION, tiled), (MULTI_HEAD_ATTENTION, packed)):
        registry._register(  # register_op infers a signature from annotations, and warns that it cannot
            target,
            OnnxDecompMeta(
                onnx_function=function, fx_target=target, signature=None, is_custom=True, skip_signature_inference=True
            ),
        )


def _score_bytes(sizes: Sequence[Any], largest: Mapping[str, float]) -> float:
    """The most bytes the scores can take; ∞ where a size has no known bound."""
    return math.prod(_largest(size, largest) for size in sizes) * SCORE_BYTES


def _largest(dim: Any, largest: Mapping[str, float]) -> float:
    if isinstance(dim, int):
        return dim
    import sympy

    expression = sympy.sympify(str(dim.value).replace("//", "/"))
    known = {symbol: largest[str(symbol)] for symbol in expression.free_symbols}
    # sizes are sums and products of counts, with a half now and then: largest where its symbols are
    value = expression.subs(known)
    return float(value) if value.is_number and expression.is_polynomial(*known) else math.inf


def _multi_head(
    query: Any, key: Any, value: Any, key_mask: Any, bias: Any, num_heads: int, scale: float, large: bool, budget: int
) -> Any:
    """Inputs of MultiHeadAttention: query, key, value, bias of the projections, key padding mask (1 = visible), scores' bias.

    ONNX Runtime keeps all scores where there is a mask: then, if they may be ``large``, it gets a tile of queries at a time.
    """
    import onnx_ir as ir

    op = opset()
    padding = None if key_mask is None else op.Cast(key_mask, to=ir.DataType.INT32)
    attributes = {"num_heads": num_heads, "scale": float(scale), "mask_filter_value": float(query.dtype.min)}

    def inputs(rows: ir.Value, of_bias: ir.Value | None) -> list[ir.Value | None]:
        given = [rows, key, value, None, padding, of_bias]
        return given[: max(at for at, item in enumerate(given) if item is not None) + 1]

    if not large or (key_mask is None and bias is None):
        return node("MultiHeadAttention", inputs(query, bias), domain=CONTRIB, version=1, **attributes)
    batch = op.Shape(query, start=0, end=1)
    row = op.Mul(op.Mul(batch, ints(num_heads * SCORE_BYTES)), op.Shape(key, start=1, end=2))
    tiles = Tiles(batch, op.Shape(query, start=1, end=2), row, budget, query.dtype, rank=3)

    def body(tile: Callable[[ir.Value, int], ir.Value]) -> ir.Value:
        given = inputs(tile(query, 1), None if bias is None else tile(bias, 2))
        return node("MultiHeadAttention", given, domain=CONTRIB, version=1, **attributes)

    return tiles.run(body, op.Shape(value, start=-1))
