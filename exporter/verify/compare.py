"""Comparison of an artifact with the eager encoder, every branch, by the tightest rule float32 allows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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

OTHER_FACTOR = 1000.0
"""Float64 that is further from eager float32 than this many times what its last bits move computes something else."""

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
    """How far eager float32 comes from ``exact`` when its inputs are moved by their last bit: the largest of ``PROBES`` runs.

    Args:
        exact: eager's outputs of ``inputs`` as they are, in float64; or in float32, where only that can be had.
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
    samples: Iterable[Sample],
    run: Run,
    eager: Eager,
    *,
    exact: Eager | None = None,
    rounded: Eager | None = None,
    scaled: bool = False,
) -> tuple[VerificationRecord, ...]:
    """Run every sample (artifact, eager float32, eager float64) and measure each output.

    A large sample runs in float64 only where the distance from float32 does not decide already. Where eager does not run in
    float64, or computes something else there, an output is judged by float32 alone, and its record says why.

    Args:
        exact: eager in float64; None: ``eager`` on inputs in float64.
        rounded: eager with the rounding of the artifact's precision, for one below float32; float64 is then not needed.
        scaled: whether what is allowed grows with an output's largest value, where that is above 1.
    """
    records = []
    for sample in samples:
        got = run(sample.inputs)
        references = _References(sample.inputs, eager, exact, rounded, sample.expected)
        for name, want in references.single.items():
            records.append(_record(sample, name, got[name], want, references, scaled=scaled))
    return tuple(records)


def _record(
    sample: Sample, name: str, got: Tensor, want: Tensor, references: _References, *, scaled: bool
) -> VerificationRecord:
    largest = float(want.double().nan_to_num(0.0, 0.0, 0.0).abs().max()) if want.numel() else 0.0
    defined = ~want.isnan() if want.is_floating_point() else torch.ones_like(want, dtype=torch.bool)
    shaped = tuple(got.shape) == tuple(want.shape) and got.dtype == want.dtype
    gap = distance(got, want, defined) if shaped else float("inf")
    metrics: dict[str, Any] = {"allowed": ABSOLUTE * max(largest, 1.0) if scaled else ABSOLUTE}
    passed = gap <= metrics["allowed"]
    if not shaped:
        passed = False
    elif references.rounded is not None:
        if want.is_floating_point():
            metrics |= references.reduced_judgement(name, got, want, gap, defined)
            passed |= reduced_passes(gap, metrics)
    elif not (passed and sample.large):
        metrics |= references.judgement(name, got, want, defined, metrics["allowed"])
        passed |= gap <= metrics["allowed"]
        if "from_float64" in metrics:
            passed |= metrics["from_float64"] <= EAGER_FACTOR * metrics["eager_from_float64"]
    if sample.unrounded is not None:
        metrics |= from_before(got, want, sample.unrounded[name])
    metrics |= undefined_metrics(got, defined) if shaped else {}
    undefined = int((~defined).sum())
    return VerificationRecord(
        branch=sample.branch,
        case=sample.case,
        output=name,
        max_abs=gap,
        max_rel=gap / largest if largest else gap,
        passed=passed and math.isfinite(gap) and (sample.all_padded or not undefined),
        undefined=undefined,
        **metrics,
    )


@dataclass(frozen=True)
class _References:
    """Runs of eager on one sample, each made when it is first asked for; see ``compare``."""

    inputs: Mapping[str, Tensor]
    eager: Eager
    exact: Eager | None
    rounded: Eager | None
    expected: Mapping[str, Tensor] | None = None

    @functools.cached_property
    def single(self) -> Mapping[str, Tensor]:
        return self.expected or self.eager(self.inputs)

    @functools.cached_property
    def double(self) -> Mapping[str, Tensor] | str:
        """Outputs in float64; or why the source's code does not run there, as of casts in TorchScript or views of bits."""
        try:
            return self.eager(_double(self.inputs)) if self.exact is None else self.exact(self.inputs)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

    @functools.cached_property
    def distances(self) -> Mapping[str, float]:
        assert not isinstance(self.double, str)
        return eager_distances(self.eager, self.inputs, self.double)

    @functools.cached_property
    def moves(self) -> Mapping[str, float]:
        """How far eager float32 goes from itself; what becomes infinite allows nothing."""
        found = eager_distances(self.eager, self.inputs, self.single)
        return {name: value if math.isfinite(value) else 0.0 for name, value in found.items()}

    @functools.cached_property
    def reduced(self) -> Mapping[str, Tensor]:
        assert self.rounded is not None
        return self.rounded(self.inputs)

    @functools.cached_property
    def moved(self) -> list[dict[str, Tensor]]:
        assert self.rounded is not None
        return list(probed(self.rounded, self.inputs, HALF_STEP))

    def judgement(self, name: str, got: Tensor, want: Tensor, defined: Tensor, allowed: float) -> dict[str, Any]:
        """Distances from float64 (decision 0004), or why there is none and what float32 alone allows.

        Args:
            allowed: distance from float32 that passes whatever float64 says.
        """
        near = distance(got, want, defined) <= allowed
        if isinstance(self.double, str):
            return self._alone(name, allowed, near, self.double)
        if self.double[name].shape != want.shape:
            return self._alone(name, allowed, near, f"its shape is {tuple(self.double[name].shape)} there")
        far, own = distance(got, self.double[name], defined), distance(want, self.double[name], defined)
        if own > OTHER_FACTOR * allowed and own > OTHER_FACTOR * self.moves[name]:
            return self._alone(name, allowed, near, f"it is {own:.0e} from float32 there, which computes something else")
        if not near and far > EAGER_FACTOR * own:
            own = max(own, self.distances[name])
        return {"from_float64": far, "eager_from_float64": own}

    def _alone(self, name: str, allowed: float, near: bool, reason: str) -> dict[str, Any]:
        return {"allowed": allowed if near else max(allowed, EAGER_FACTOR * self.moves[name]), "float32_alone": reason}

    def reduced_judgement(self, name: str, got: Tensor, want: Tensor, gap: float, defined: Tensor) -> dict[str, float]:
        """What eager rounded likewise allows (decision 0010)."""
        metrics = reduced_metrics(got, want, self.reduced[name], defined)
        if not reduced_passes(gap, metrics):  # a few numbers may be near by chance
            for run in self.moved:
                other = reduced_metrics(got, want, run[name], defined)
                metrics |= {key: max(metrics[key], other[key]) for key in ("allowed", "eager_rms_rel")}
        return metrics


def undefined_metrics(got: Tensor, defined: Tensor) -> dict[str, Any]:
    """How many values are NaN in the artifact alone, and where the first stands that is NaN in it or in eager."""
    alone = got.isnan() & defined if got.is_floating_point() else torch.zeros_like(defined)
    places = (alone | ~defined).nonzero()
    return {
        "undefined_in_artifact": int(alone.sum()),
        "first_undefined": tuple(places[0].tolist()) if len(places) else None,
    }


def reduced_metrics(got: Tensor, expected: Tensor, other: Tensor, defined: Tensor) -> dict[str, float]:
    """What an output below float32 may be off, from ``other``, eager with that precision's rounding (decision 0010)."""
    usable = defined & (other.isfinite() | (other == expected))  # what eager overflows in allows nothing
    allowed = max(ABSOLUTE, REDUCED_FACTOR * distance(other, expected, usable))
    return {"allowed": allowed, "rms_rel": _rms(got, expected, defined), "eager_rms_rel": _rms(other, expected, usable)}


def reduced_passes(gap: float, metrics: Mapping[str, float]) -> bool:
    """Whether an output that is ``gap`` off at worst is as near as ``reduced_metrics`` asks."""
    return gap <= metrics["allowed"] and metrics["rms_rel"] <= rms_allowed(metrics["eager_rms_rel"])


def rms_allowed(eager_rms_rel: float) -> float:
    """What the root mean square of an output's difference may be, of the output's, where eager's own rounding has that one."""
    return max(ABSOLUTE, REDUCED_RMS_FACTOR * eager_rms_rel)


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
    if record.rms_rel is not None and record.eager_rms_rel is not None and record.max_abs <= record.allowed:
        allowed = (
            f"allowed {rms_allowed(record.eager_rms_rel):.1e}, {REDUCED_RMS_FACTOR:g} times what that rounding costs eager"
        )
        return f"is {record.rms_rel:.1e} of its size from eager in the root mean square, {allowed}"
    return f"is {record.max_abs:.1e} from eager, allowed {record.allowed:.0e}"


def check_pass(before: CapturedProgram, after: CapturedProgram, pass_: object, earlier: tuple[str, ...]) -> float:
    """Largest change a pass made on the branch samples; raises when the result left the tolerance (``--verify each``)."""
    largest = 0.0
    for sample in after.samples:
        old = run_program(before.program, sample.inputs, before.output_names)
        new = run_program(after.program, sample.inputs, after.output_names)
        largest = max([largest, *(distance(new[name], old[name]) for name in old)])
    name = getattr(pass_, "name", str(pass_))
    records = compare(
        after.samples,
        lambda x: run_program(after.program, x, after.output_names),
        after.eager,
        exact=after.exact,
        scaled=after.scaled,
    )
    require(records, Step.PASSES, f"'{name}' after {list(earlier)}", leave_out(name))
    return largest
