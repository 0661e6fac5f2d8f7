"""``aten.linear`` as one ``Gemm``: bias and product in one pass over memory, and nothing in between for a larger tensor."""

from __future__ import annotations

from typing import Any


def opset() -> Any:
    """onnxscript's opset 18, untyped: its annotations are for tensors, the converter hands over graph values."""
    from onnxscript import opset18

    return opset18


def register(registry: Any) -> None:
    """Have torch's converter (an ``ONNXRegistry``) use it."""
    import torch
    from torch.onnx._internal.exporter._registration import OnnxDecompMeta

    target = torch.ops.aten.linear.default
    registry._register(
        target,
        OnnxDecompMeta(onnx_function=_linear, fx_target=target, signature=None, is_custom=True, skip_signature_inference=True),
    )


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """(…, C), (E, C), (E) → (…, E). ONNX Runtime adds the bias to a product of more than two dimensions in a second pass."""
    op = opset()
    rank, width = len(x.shape), weight.shape[0]
    operands = (weight,) if bias is None else (weight, bias)
    if rank == 2:
        return op.Gemm(x, *operands, transB=1)
    rows = op.Reshape(x, op.Constant(value_ints=[-1, weight.shape[1]]))
    rows.dtype = x.dtype
    made = op.Gemm(rows, *operands, transB=1)
    shape = op.Concat(op.Shape(x, start=0, end=rank - 1), op.Constant(value_ints=[width]), axis=0)
    return op.Reshape(made, shape)
