"""A component with rounded weights (decision 0015), or with the rounding of a lower precision (0010)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from sam3x.precision.emulate import eager_in
from sam3x.precision.weights import rounded_weights, swapped
from sam3x.sources.contract import Component
from sam3x.targets.base import Target, TargetOptions, arithmetic_precision, half_sums
from sam3x.verify.compare import Eager
from sam3x.verify.component import Case


@contextlib.contextmanager
def rounded(component: Component, precision: str | None, cases: Sequence[Case]) -> Iterator[list[Case]]:
    """Within it ``component`` computes with rounded weights, eager and captured; yields ``cases`` with what it then gives.

    Args:
        precision: ``fp16`` or ``int8``; None leaves everything as it is.
    """
    if precision is None:
        yield list(cases)
        return
    trees = [component.module, *([component.fusion[0]] if component.fusion is not None else [])]
    weights = rounded_weights(trees, precision, lambda: component.eager(cases[0][1]))
    with swapped(trees, weights):
        yield [(case, inputs, component.eager(inputs)) for case, inputs, _ in cases]


def reduced(component: Component, target: Target, options: TargetOptions) -> Eager | None:
    """``component`` in eager as the target computes it below float32; None where it computes in float32."""
    precision = arithmetic_precision(target, options)
    if precision is None:
        return None

    def eager(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with eager_in(precision, half_sums=half_sums(target, options)):
            return component.eager(inputs)

    return eager
