"""A component's artifact against the source's own eager code, by the rule of decision 0004 scaled to the outputs' size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam3x.manifest import TensorSpec, VerificationRecord
from sam3x.pipeline.contract import Component
from sam3x.targets.base import Runner
from sam3x.verify import (
    EAGER_FACTOR,
    HALF_STEP,
    Eager,
    distance,
    eager_distances,
    from_before,
    probed,
    reduced_facts,
    reduced_passes,
)

RELATIVE = 2e-5
"""Of an output's largest value: what another order of summation may cost through some tens of layers."""

Case = tuple[str, Mapping[str, Tensor], Mapping[str, Tensor]]
"""Sizes in words, inputs, eager float32 outputs."""


def verify_component(
    component: Component,
    open_runner: Callable[[], Runner],
    cases: Iterable[Case],
    unrounded: Sequence[Mapping[str, Tensor]] | None = None,
    reduced: Eager | None = None,
) -> tuple[VerificationRecord, ...]:
    """Run the artifact on inputs that eager components made, and measure every output.

    An output that is further off than ``RELATIVE`` is compared with an eager float64 run: it passes when it is no further from
    that than four times eager float32 itself. The artifact's own copy of the weights is gone by then.

    Args:
        unrounded: eager outputs of each case with the weights as they were, where ``component`` has rounded ones.
        reduced: eager with the rounding of a precision below float32, whose rule is then decision 0010's.
    """
    records = []
    given = list(cases)
    results = _run(open_runner(), given)
    branch = " ".join(f"{name}={value.tolist()}" for name, value in component.constants.items()) or "fixed"
    for index, ((case, inputs, expected), got) in enumerate(zip(given, results, strict=True)):
        double: dict[str, Tensor] | None = None
        distances: dict[str, float] = {}
        moved: list[dict[str, Tensor]] = []
        other = {} if reduced is None else reduced(inputs)
        for name, want in expected.items():
            shaped = tuple(got[name].shape) == tuple(want.shape) and got[name].dtype == want.dtype
            gap = distance(got[name], want) if shaped else float("inf")
            largest = float(want.double().abs().max()) if want.numel() else 0.0
            facts: dict[str, Any] = {"allowed": RELATIVE * max(largest, 1.0), "from_float64": 0.0, "eager_from_float64": 0.0}
            passed = gap <= facts["allowed"]
            if other and shaped and want.is_floating_point():
                facts |= reduced_facts(got[name], want, other[name], ~want.isnan())
                if reduced is not None and not passed and not reduced_passes(gap, facts):  # a few numbers may be near by chance
                    moved = moved or list(probed(reduced, inputs, HALF_STEP))
                    for run in moved:
                        facts = _further(facts, reduced_facts(got[name], want, run[name], ~want.isnan()))
                passed = passed or reduced_passes(gap, facts)
            elif not passed and shaped:
                double = double if double is not None else component.eager_double(inputs)
                far, own = distance(got[name], double[name]), distance(want, double[name])
                if far > EAGER_FACTOR * own:
                    distances = distances or eager_distances(component.eager, inputs, double)
                    own = max(own, distances[name])
                facts.update(from_float64=far, eager_from_float64=own)
                passed = far <= EAGER_FACTOR * own
            if unrounded is not None:
                facts |= from_before(got[name], want, unrounded[index][name])
            records.append(
                VerificationRecord(
                    branch=branch,
                    case=case,
                    output=name,
                    max_abs=gap,
                    max_rel=gap / largest if largest else gap,
                    passed=passed,
                    **facts,
                )
            )
    return tuple(records)


def _further(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What the reference that is further off allows."""
    return {**one, **{name: max(one[name], other[name]) for name in ("allowed", "eager_rms_rel")}}


def _run(runner: Runner, cases: list[Case]) -> list[dict[str, Tensor]]:
    results = []
    for case in cases:
        arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in case[1].items()}
        results.append({name: torch.from_numpy(np.array(value)) for name, value in runner.run(arrays).items()})
    return results


def described(name: str, value: Tensor, dims: Sequence[str | None]) -> TensorSpec:
    """What the manifest says of an input or output. ``dims``: the names of its sizes; an empty one: all as they are."""
    named = dims or (None,) * value.dim()
    shape = tuple(dim or int(size) for dim, size in zip(named, value.shape, strict=True))
    return TensorSpec(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=shape)
