"""What the precision doctor found, as data. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

AttentionForm = Literal["layer", "explicit"]
"""How attention is computed below float32: see ``sam3x.precision.attention``."""

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
    """All operations, worst first, and the fewest that keep the rest within the bound.

    ``component``: of a whole model; None: the fusion encoder by itself. ``scaled``: whether errors and ``bound`` are taken of
    the largest value of each output, as everywhere but in a fusion encoder, whose scale is one.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    component: str | None = None
    scaled: bool = False
    precision: Precision
    attention: AttentionForm = "layer"
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
        return option_of([self])

    @property
    def verdict(self) -> str:
        """One sentence."""
        of = " of the largest value" if self.scaled else ""
        far = f"is {self.max_abs:.2g}{of} from eager float32 (cosine {self.cosine:.5f})"
        everything = f"everything in {self.precision} {'is not finite' if math.isinf(self.max_abs) else far}"
        if not self.fp32_ops:
            return f"{everything}, within {self.bound:g}: no operation needs float32."
        count = f"{len(self.fp32_ops)} operation{'s' if len(self.fp32_ops) > 1 else ''}"
        return (
            f"{everything}, where {self.bound:g} is allowed. With {count} in float32 it is {self.max_abs_with_fp32_ops:.2g} "
            f"(cosine {self.cosine_with_fp32_ops:.5f})."
        )


class PipelineDoctorReport(BaseModel):
    """Each component of a whole model that was examined, in the order in which they run."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    components: tuple[DoctorReport, ...]

    @property
    def option(self) -> str:
        """The options of ``sam3x export --pipeline`` that keep those operations in float32."""
        return option_of(self.components)


def option_of(reports: Sequence[DoctorReport]) -> str:
    """The precision, and each operation that stays in float32 with its component."""
    names = [f"{report.component}:{name}" if report.component else name for report in reports for name in report.fp32_ops]
    form = " --attention explicit" if reports[0].attention == "explicit" else ""
    return f"--precision {reports[0].precision}{form}" + (f" --fp32-ops {','.join(names)}" if names else "")


def command_of(reports: Sequence[DoctorReport]) -> str:
    """The export that the reports propose."""
    whole = "--pipeline " if reports[0].component else ""
    return f"sam3x export {whole}--target {'onnx' if reports[0].precision == 'int8' else 'trt'} {option_of(reports)}"
