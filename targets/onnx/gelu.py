"""``aten.gelu`` in the order of products that ONNX Runtime knows as one kernel: five passes over memory become one."""

from __future__ import annotations

import math
from typing import Any

from sam3x.targets.onnx.linear import opset


def register(registry: Any) -> None:
    """Have torch's converter (an ``ONNXRegistry``) use it; ``approximate="tanh"`` stays with what the registry has."""
    import torch
    from torch.onnx._internal.exporter._registration import OnnxDecompMeta

    target = torch.ops.aten.gelu.default
    other = registry.get_decomps(target)[0].onnx_function

    def gelu(x: Any, approximate: str = "none") -> Any:
        return _gelu(x) if approximate == "none" else other(x, approximate=approximate)

    registry._register(
        target,
        OnnxDecompMeta(onnx_function=gelu, fx_target=target, signature=None, is_custom=True, skip_signature_inference=True),
    )


def _gelu(x: Any) -> Any:
    """x · (1 + erf(x / √2)) · ½, any shape; torch's converter halves before it multiplies, which gives the same bits."""
    import numpy as np
    import onnx_ir as ir

    op = opset()

    def scalar(value: float) -> Any:
        return op.Constant(value=ir.tensor(np.array(value, dtype=x.dtype.numpy())))

    raised = op.Add(op.Erf(op.Div(x, scalar(math.sqrt(2.0)))), scalar(1.0))
    return op.Mul(op.Mul(x, raised), scalar(0.5))
