"""``--fp32-ops auto``: the operations of one component that must stay in float32, found by their errors."""

from __future__ import annotations

from collections.abc import Sequence

from sam3x.capture.program import CapturedProgram, Sample
from sam3x.precision.doctor import DTYPES, Probe, needed_fp32_ops, rewritten
from sam3x.precision.doctor_report import BOUNDS, AttentionForm
from sam3x.targets.base import Float32Operations


def measured(options: Float32Operations, captured: CapturedProgram, samples: Sequence[Sample]) -> Float32Operations:
    """``options`` with the fewest names that hold their bound, on ``samples``, by the doctor's emulation.

    Raises:
        VerificationError: float32 itself is beyond the bound.
    """
    precision: str = getattr(options, "precision", "fp32")
    given = getattr(options, "attention", None)
    # ONNX Runtime has a softmax of its own, in float32
    form: AttentionForm = given if given in ("layer", "explicit") else "layer" if precision == "int8" else "explicit"
    convolutions = bool(getattr(options, "calibrate", ""))
    probe = Probe(rewritten(captured), samples, DTYPES[precision], form, convolutions=convolutions)
    bound = BOUNDS[precision] if options.fp32_bound is None else options.fp32_bound
    return options.with_names(needed_fp32_ops(probe, bound))
