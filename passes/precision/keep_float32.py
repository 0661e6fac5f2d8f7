"""Linears and convolutions that a target must not quantize, told by their weights, which later passes cut, join and move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram

from sam3x.passes.base import Pass, PassResult
from sam3x.passes.graph.aten_nodes import aten
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.op_paths import idle, matching, op_paths
from sam3x.passes.precision.convert_precision import require_known

_library = torch.library.Library("sam3x", "FRAGMENT")
_library.define("float32_weight(Tensor weight) -> Tensor")
FLOAT32_WEIGHT = torch.ops.sam3x.float32_weight.default
"""A weight as it is; what it is multiplied with stays float32."""


@torch.library.impl(_library, "float32_weight", "CompositeExplicitAutograd")
def _float32_weight(weight: Tensor) -> Tensor:
    return weight.clone()


@torch.library.impl(_library, "float32_weight", "Meta")
def _shape(weight: Tensor) -> Tensor:
    return torch.empty_like(weight)


class KeepFloat32Pass(Pass):
    """``linear(x, weight)`` → ``linear(x, sam3x::float32_weight(weight))``, and ``convolution``, for those ``fp32_ops`` names.

    Args:
        fp32_ops: see ``op_paths.matching``. shared: whether several graphs are given them, see ``ConvertPrecisionPass``.
    """

    name = "keep_float32"

    def __init__(self, fp32_ops: Sequence[str], *, shared: bool = False) -> None:
        self.fp32_ops, self.shared = tuple(fp32_ops), shared

    def requires(self, program: ExportedProgram) -> None:
        if not self.shared:
            require_known(program, self.fp32_ops)

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, failures = 0, idle(program, self.fp32_ops)
        for node in matching(op_paths(program), self.fp32_ops)[0]:
            weight = node.args[1] if node.target in (aten.linear.default, aten.convolution.default) else None
            if weight is not None and weight.target is not FLOAT32_WEIGHT:  # type: ignore[union-attr]
                kept = Emitter(node.graph.owning_module, node)(FLOAT32_WEIGHT, weight)
                node.update_arg(1, kept)
                rewrites += 1
        return PassResult(rewrites=rewrites, match_failures=failures)
