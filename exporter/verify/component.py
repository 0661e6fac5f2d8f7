"""A component's artifact against the source's own eager code, by the rule of decision 0004 scaled to the outputs' size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam3x.sources.contract import Component
from sam3x.verify.compare import (
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
from sam3x.verify.record import Runner, TensorSpec, VerificationRecord

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
        references = _References(component, inputs, reduced)
        for name, want in expected.items():
            largest = float(want.double().abs().max()) if want.numel() else 0.0
            allowed = RELATIVE * max(largest, 1.0)
            shaped = tuple(got[name].shape) == tuple(want.shape) and got[name].dtype == want.dtype
            gap = distance(got[name], want) if shaped else float("inf")
            facts: dict[str, Any] = {
                "allowed": allowed,
                "from_float64": 0.0,
                "eager_from_float64": 0.0,
                "passed": gap <= allowed,
            }
            if shaped and reduced is not None and want.is_floating_point():
                facts |= references.reduced_judgement(name, got[name], want, gap)
                facts["passed"] |= gap <= allowed
            elif shaped and gap > allowed:
                facts |= references.judgement(name, got[name], want)
            if unrounded is not None:
                facts |= from_before(got[name], want, unrounded[index][name])
            relative = gap / largest if largest else gap
            records.append(VerificationRecord(branch=branch, case=case, output=name, max_abs=gap, max_rel=relative, **facts))
    return tuple(records)


class _References:
    """Other runs of eager on one case, each made when it is first asked for.

    Args:
        reduced: see ``verify_component``.
    """

    def __init__(self, component: Component, inputs: Mapping[str, Tensor], reduced: Eager | None) -> None:
        self.component, self.inputs, self.reduced = component, inputs, reduced

    @cached_property
    def double(self) -> dict[str, Tensor]:
        return self.component.eager_double(self.inputs)

    @cached_property
    def distances(self) -> dict[str, float]:
        return eager_distances(self.component.eager, self.inputs, self.double)

    @cached_property
    def rounded(self) -> Mapping[str, Tensor]:
        assert self.reduced is not None
        return self.reduced(self.inputs)

    @cached_property
    def moved(self) -> list[dict[str, Tensor]]:
        assert self.reduced is not None
        return list(probed(self.reduced, self.inputs, HALF_STEP))

    def judgement(self, name: str, got: Tensor, want: Tensor) -> dict[str, Any]:
        """By the distance from float64 (decision 0004)."""
        far, own = distance(got, self.double[name]), distance(want, self.double[name])
        if far > EAGER_FACTOR * own:
            own = max(own, self.distances[name])
        return {"from_float64": far, "eager_from_float64": own, "passed": far <= EAGER_FACTOR * own}

    def reduced_judgement(self, name: str, got: Tensor, want: Tensor, gap: float) -> dict[str, Any]:
        """By the distance of eager rounded likewise (decision 0010)."""
        facts = reduced_facts(got, want, self.rounded[name], ~want.isnan())
        if not reduced_passes(gap, facts):  # a few numbers may be near by chance
            for run in self.moved:
                facts = _further(facts, reduced_facts(got, want, run[name], ~want.isnan()))
        return {**facts, "passed": reduced_passes(gap, facts)}


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
