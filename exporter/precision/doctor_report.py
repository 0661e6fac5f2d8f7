"""What the precision doctor found, as data. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict

Precision = Literal["fp16", "bf16", "int8"]
BOUNDS: dict[str, float] = {"fp16": 2e-2, "bf16": 1.5e-1, "int8": 5e-1}
"""Largest absolute error by default: what six layers of unit scale keep with every operation in that precision, doubled."""


class OperationReport(BaseModel):
    """One operation (or several that share a path).

    ``max_abs``, ``cosine``: the outputs' distance from eager float32 with this operation alone in the low precision, worst of
    all branches. ``peak``: its largest magnitude in float32; ``overflows``: that is beyond the low precision.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    path: str
    kind: str
    max_abs: float
    cosine: float
    peak: float
    overflows: bool
    in_float32: bool


class DoctorReport(BaseModel):
    """All operations, worst first, and the fewest that keep the rest within the bound."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    precision: Precision
    bound: float
    origin: str
    branches: tuple[str, ...]
    cases: tuple[str, ...]
    max_abs: float
    cosine: float
    fp32_ops: tuple[str, ...]
    max_abs_with_fp32_ops: float
    cosine_with_fp32_ops: float
    operations: tuple[OperationReport, ...]

    @property
    def option(self) -> str:
        """What to give to ``sam3x export``."""
        fp32_ops = f" --fp32-ops {','.join(self.fp32_ops)}" if self.fp32_ops else ""
        return f"--precision {self.precision}{fp32_ops}"

    @property
    def verdict(self) -> str:
        """One sentence."""
        far = f"is {self.max_abs:.2g} from eager float32 (cosine {self.cosine:.5f})"
        everything = f"everything in {self.precision} {'is not finite' if math.isinf(self.max_abs) else far}"
        if not self.fp32_ops:
            return f"{everything}, within {self.bound:g}: no operation needs float32."
        count = f"{len(self.fp32_ops)} operation{'s' if len(self.fp32_ops) > 1 else ''}"
        return (
            f"{everything}, where {self.bound:g} is allowed. With {count} in float32 it is {self.max_abs_with_fp32_ops:.2g} "
            f"(cosine {self.cosine_with_fp32_ops:.5f})."
        )
