"""Comparison of an artifact with the eager encoder, every branch, by the tightest rule float32 allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sam3x.capture.program import CapturedProgram, Sample, run_program
from sam3x.errors import Step, VerificationError
from sam3x.passes.pipeline import leave_out
from sam3x.verify.record import VerificationRecord

ABSOLUTE = 2e-5
"""Six layers of unit scale: float32 eager is 5e-6 from float64, and another order of summation doubles that at most."""

EAGER_FACTOR = 4.0
"""Peaked attention or larger activations: no further from float64 than this many times eager float32 itself."""

PROBES = 4
"""Runs of eager float32 on inputs a last bit away: a single run may be near float64 by chance."""

HALF_STEP = 2.0**-11
"""Half the last bit of float16: what rounding an input to it may move."""

REDUCED_FACTOR, REDUCED_RMS_FACTOR = 4.0, 3.0
"""Below float32: no further from eager float32 than this many times eager rounded the same way, at worst and on average."""

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
Eager = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def distance(left: Tensor, right: Tensor, defined: Tensor | None = None) -> float:
    """Largest absolute difference where ``defined``; equal infinities and NaN on both sides agree, on one side never."""
    left, right = left.double(), right.double()
    same = (left == right) | (left.isnan() & right.isnan())
    if defined is not None:
        same |= ~defined
    gap = torch.where(same, torch.zeros((), dtype=torch.float64), (left - right).abs())
    if gap.numel() == 0:
        return 0.0
    return float("inf") if bool(gap.isnan().any()) else float(gap.max())


def _double(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def eager_distances(eager: Eager, inputs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """How far eager float32 comes from float64 when its inputs are moved by their last bit: the largest of ``PROBES`` runs.

    Args:
        exact: eager's outputs in float64, of ``inputs`` as they are.
    """
    found = dict.fromkeys(exact, 0.0)
    for outputs in probed(eager, inputs, torch.finfo(torch.float32).eps):
        for name, value in outputs.items():
            found[name] = max(found[name], distance(value, exact[name], ~value.isnan()))
    return found


def probed(eager: Eager, inputs: Mapping[str, Tensor], step: float) -> Iterator[dict[str, Tensor]]:
    """Outputs of ``PROBES`` runs with float32 inputs that are ``step`` of themselves more, or less, or as they were."""
    for seed in range(PROBES):
        generator = torch.Generator().manual_seed(seed)
        yield eager({name: _moved(value, generator, step) for name, value in inputs.items()})


def _moved(value: Tensor, generator: torch.Generator, step: float) -> Tensor:
    if value.dtype != torch.float32:
        return value
    return value * (1 + torch.randint(-1, 2, value.shape, generator=generator) * step)


def compare(
    samples: Iterable[Sample], run: Run, eager: Eager, rounded: Eager | None = None, unrounded: Eager | None = None
) -> tuple[VerificationRecord, ...]:
    """Run every sample (artifact, eager float32, eager float64) and measure each output.

    A large sample runs in float64 only where the distance from float32 does not decide already.

    Args:
        rounded: eager with the rounding of the artifact's precision, for one below float32; float64 is then not needed.
        unrounded: eager as it was, where ``eager`` has rounded weights: how far it is from that is told, and decides nothing.
    """
    records = []
    for sample in samples:
        single, actual = eager(sample.inputs), run(sample.inputs)
        other = rounded(sample.inputs) if rounded is not None else None
        before = unrounded(sample.inputs) if unrounded is not None else None
        double = None if sample.large or other is not None else eager(_double(sample.inputs))
        distances: dict[str, float] | None = None
        for name, expected in single.items():
            got = actual[name]
            shaped = tuple(got.shape) == tuple(expected.shape) and got.dtype == expected.dtype
            defined = ~expected.isnan() if expected.is_floating_point() else torch.ones_like(expected, dtype=torch.bool)
            gap = distance(got, expected, defined) if shaped else float("inf")
            if double is None and other is None and shaped and gap > ABSOLUTE:
                double = eager(_double(sample.inputs))  # minutes of float64 only where float32 does not decide
            facts: dict[str, Any] = {"allowed": ABSOLUTE}
            near = False
            if double is not None:
                far = distance(got, double[name], defined) if shaped else float("inf")
                own = distance(expected, double[name], defined)
                if shaped and gap > ABSOLUTE and far > EAGER_FACTOR * own:
                    distances = distances or eager_distances(eager, sample.inputs, double)
                    own = max(own, distances[name])
                facts.update(from_float64=far, eager_from_float64=own)
                near = far <= EAGER_FACTOR * own
            if other is not None and expected.is_floating_point():
                facts |= reduced_facts(got, expected, other[name], defined) if shaped else {}
                near = shaped and reduced_passes(gap, facts)
            if before is not None:
                facts.update(from_before(got, expected, before[name]))
            largest = float(expected.double().nan_to_num(0.0, 0.0, 0.0).abs().max()) if expected.numel() else 0.0
            undefined = int((~defined).sum())
            facts.update(undefined_facts(got, defined) if shaped else {})
            records.append(
                VerificationRecord(
                    branch=sample.branch,
                    case=sample.case,
                    output=name,
                    max_abs=gap,
                    max_rel=gap / largest if largest else gap,
                    passed=(gap <= ABSOLUTE or near) and (sample.all_padded or not undefined),
                    undefined=undefined,
                    **facts,
                )
            )
    return tuple(records)


def undefined_facts(got: Tensor, defined: Tensor) -> dict[str, Any]:
    """How many values are NaN in the artifact alone, and where the first stands that is NaN in it or in eager."""
    alone = got.isnan() & defined if got.is_floating_point() else torch.zeros_like(defined)
    places = (alone | ~defined).nonzero()
    return {
        "undefined_in_artifact": int(alone.sum()),
        "first_undefined": tuple(places[0].tolist()) if len(places) else None,
    }


def reduced_facts(got: Tensor, expected: Tensor, other: Tensor, defined: Tensor) -> dict[str, float]:
    """What an output below float32 may be off, from ``other``, eager with that precision's rounding (decision 0010)."""
    usable = defined & (other.isfinite() | (other == expected))  # what eager overflows in allows nothing
    allowed = max(ABSOLUTE, REDUCED_FACTOR * distance(other, expected, usable))
    return {"allowed": allowed, "rms_rel": _rms(got, expected, defined), "eager_rms_rel": _rms(other, expected, usable)}


def reduced_passes(gap: float, facts: Mapping[str, float]) -> bool:
    """Whether an output that is ``gap`` off at worst is as near as ``reduced_facts`` asks."""
    return gap <= facts["allowed"] and facts["rms_rel"] <= max(ABSOLUTE, REDUCED_RMS_FACTOR * facts["eager_rms_rel"])


def from_before(got: Tensor, expected: Tensor, before: Tensor) -> dict[str, float]:
    """What rounding weights cost: ``got`` and ``expected``, both with rounded weights, against ``before``, eager as it was."""
    if got.shape != before.shape or not before.is_floating_point():
        return {}
    defined = ~(before.isnan() | expected.isnan() | got.isnan())
    far, own = _rms(got, before, defined), _rms(expected, before, defined)
    return {"from_unrounded": distance(got, before, defined), "rms_rel": far, "eager_rms_rel": own}


def _rms(value: Tensor, expected: Tensor, defined: Tensor) -> float:
    """Root mean square of the difference over that of ``expected``, where ``defined``."""
    if not bool(defined.any()):
        return 0.0
    gap, size = (value - expected)[defined].double().square().mean(), expected[defined].double().square().mean()
    return float((gap / size).sqrt()) if size else float(gap.sqrt())


FIND_PASS = "Re-run with --verify each to find the pass."
"""The remedy where a pass may be to blame."""


def require(records: Iterable[VerificationRecord], step: Step, subject: str, remedy: str = "") -> None:
    """Raise for the worst failed record: branch, output, how far off.

    Args:
        step: where the records come from. subject: which artifact or pass. remedy: what to do next.

    Raises:
        VerificationError: a record failed.
    """
    failed = [record for record in records if not record.passed]
    if failed:
        worst = max(failed, key=lambda record: record.max_abs)
        where = f"branch {worst.branch} at {worst.case}: output '{worst.output}'"
        raise VerificationError(
            f"{where} {_fault(worst)} ({len(failed)} comparisons failed)",
            subject=subject,
            remedy=remedy,
            step=step,
        )


def _fault(record: VerificationRecord) -> str:
    """What is wrong with an output: values that are not defined, where, and in whom; or how far off it is."""
    first = f"the first at {list(record.first_undefined)}" if record.first_undefined is not None else ""
    if record.undefined_in_artifact:
        return f"has {record.undefined_in_artifact} undefined values (NaN) in the artifact, {first}, where eager has numbers"
    if record.undefined:
        return (
            f"has {record.undefined} undefined values (NaN) in eager itself, {first}, as a softmax over keys that are all "
            f"hidden gives; the artifact is {record.max_abs:.1e} off elsewhere, allowed {record.allowed:.0e}"
        )
    return f"is {record.max_abs:.1e} from eager, allowed {record.allowed:.0e}"


def check_pass(before: CapturedProgram, after: CapturedProgram, pass_: object, earlier: tuple[str, ...]) -> float:
    """Largest change a pass made on the branch samples; raises when the result left the tolerance (``--verify each``)."""
    largest = 0.0
    for sample in after.samples:
        old = run_program(before.program, sample.inputs, before.output_names)
        new = run_program(after.program, sample.inputs, after.output_names)
        largest = max([largest, *(distance(new[name], old[name]) for name in old)])
    name = getattr(pass_, "name", str(pass_))
    records = compare(after.samples, lambda x: run_program(after.program, x, after.output_names), after.eager)
    require(records, Step.PASSES, f"'{name}' after {list(earlier)}", leave_out(name))
    return largest
