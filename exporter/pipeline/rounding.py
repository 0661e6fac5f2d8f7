"""A component whose weights are rounded for as long as it is exported or verified (decision 0015)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from sam3x.pipeline.contract import Component
from sam3x.pipeline.verify import Case
from sam3x.weight_rounding import rounded_weights, swapped


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
