"""``aten.native_group_norm`` in two reductions: ONNX Runtime adds a whole group up in one float32 sum, and loses three digits.

A group of SAM3's mask head at 1008 pixels has 2.65 million elements: ``InstanceNormalization``, which the converter writes for
it, is 3·10⁻³ from float64 there where torch is 8·10⁻⁷; row by row it is 7·10⁻⁶.
"""

from __future__ import annotations

from typing import Any

from sam3x.targets.onnx.linear import opset


def register(registry: Any) -> None:
    """Have torch's converter (an ``ONNXRegistry``) use it."""
    import torch
    from torch.onnx._internal.exporter._registration import OnnxDecompMeta

    target = torch.ops.aten.native_group_norm.default
    registry._register(
        target,
        OnnxDecompMeta(
            onnx_function=_group_norm, fx_target=target, signature=None, is_custom=True, skip_signature_inference=True
        ),
    )


def _group_norm(x: Any, weight: Any, bias: Any, n: Any, c: int, hxw: Any, groups: int, eps: float) -> tuple[Any, Any, Any]:
    """(N, C, …) → the same, and mean and reciprocal deviation (N, groups) as aten gives them."""
    op = opset()
    width = x.shape[-1] if len(x.shape) > 2 else 1
    last = op.Constant(value_ints=[width]) if isinstance(width, int) else op.Shape(x, start=-1)
    rows = op.Reshape(x, op.Concat(op.Constant(value_ints=[0, groups, -1]), last, axis=0))
    inner, outer = op.Constant(value_ints=[3]), op.Constant(value_ints=[2])
    mean = op.ReduceMean(op.ReduceMean(rows, inner), outer)
    centred = op.Sub(rows, mean)
    variance = op.ReduceMean(op.ReduceMean(op.Mul(centred, centred), inner), outer)
    rstd = op.Reciprocal(op.Sqrt(op.Add(variance, op.CastLike(op.Constant(value_float=eps), x))))
    made = op.Reshape(op.Mul(centred, rstd), op.Shape(x))
    channels = op.Constant(value_ints=[c, *[1] * (len(x.shape) - 2)])
    if weight is not None:
        made = op.Mul(made, op.Reshape(weight, channels))
    if bias is not None:
        made = op.Add(made, op.Reshape(bias, channels))
    flat = op.Constant(value_ints=[0, 0])
    return made, op.Reshape(mean, flat), op.Reshape(rstd, flat)
