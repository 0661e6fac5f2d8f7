"""ONNX for ``sam3x::tiled_feed_forward``: a ``Loop`` over tiles of rows, so that no whole hidden layer is ever there."""

from __future__ import annotations

import math
from typing import Any

from sam3x.targets.onnx import loop as onnx_loop
from sam3x.targets.onnx.linear import opset
from sam3x.targets.onnx.loop import ints


def register(registry: Any) -> None:
    """Teach torch's converter (an ``ONNXRegistry``) the operator; its activation is what the registry has for it."""
    import torch
    from torch.onnx._internal.exporter._registration import OnnxDecompMeta

    from sam3x.passes.linear.tile_feed_forward import TILED_FEED_FORWARD

    aten = torch.ops.aten
    words: dict[str, tuple[Any, dict[str, str]]]
    words = {"relu": (aten.relu.default, {}), "gelu": (aten.gelu.default, {}), "silu": (aten.silu.default, {})}
    words["gelu_tanh"] = (aten.gelu.default, {"approximate": "tanh"})

    def feed_forward(x: Any, weight1: Any, bias1: Any, activation: str, weight2: Any, bias2: Any) -> Any:
        target, options = words[activation]
        activate = registry.get_decomps(target)[0].onnx_function
        return _feed_forward(x, (weight1, bias1), lambda hidden: activate(hidden, **options), (weight2, bias2))

    registry._register(
        TILED_FEED_FORWARD,
        OnnxDecompMeta(
            onnx_function=feed_forward,
            fx_target=TILED_FEED_FORWARD,
            signature=None,
            is_custom=True,
            skip_signature_inference=True,
        ),
    )


def _feed_forward(x: Any, first: tuple[Any, Any], activate: Any, second: tuple[Any, Any]) -> Any:
    import onnx_ir as ir

    op = opset()
    rank, (hidden, width), last = len(x.shape), first[0].shape, second[0].shape[0]

    def of_rows(rows: Any) -> Any:
        made = op.Gemm(rows, *(item for item in first if item is not None), transB=1)
        made.dtype, made.shape = x.dtype, ir.Shape([None, hidden])
        return op.Gemm(activate(made), *(item for item in second if item is not None), transB=1)

    known = math.prod(dim for dim in x.shape[:-1] if isinstance(dim, int))
    even = onnx_loop.largest_divisor(known, onnx_loop.TILE_BYTES // (hidden * int(x.dtype.itemsize)))
    if even >= onnx_loop.TILE_ROWS:  # tiles without a rest, whatever the other dimensions are: nothing to cut and join
        tiles = op.Reshape(x, ints(-1, even, width))
        tiles.dtype, tiles.shape = x.dtype, ir.Shape([None, even, width])

        def one(rows: Any) -> Any:
            made = of_rows(rows)
            made.dtype, made.shape = x.dtype, ir.Shape([even, last])
            return made

        made = onnx_loop.for_each([tiles], one, "tile")
    else:
        rows = x if rank == 2 else op.Reshape(x, ints(-1, width))
        rows.dtype, rows.shape = x.dtype, ir.Shape([None, width])
        count = op.Shape(rows, start=0, end=1)
        tiles = onnx_loop.Tiles(None, count, ints(hidden * int(x.dtype.itemsize)), 2 * onnx_loop.TILE_BYTES, x.dtype, rank=2)
        made = tiles.run(lambda tile: of_rows(tile(rows, 0)), ints(last))
        if rank == 2:
            return made
    return op.Reshape(made, op.Concat(op.Shape(x, start=0, end=rank - 1), ints(last), axis=0))
