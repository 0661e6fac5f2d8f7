"""A component with rounded weights (decision 0015), or with the rounding of a lower precision (0010)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from sam3x.capture.program import Sample
from sam3x.precision.weights import rounded_weights, swapped
from sam3x.sources.contract import Component
from sam3x.targets.base import Numerics
from sam3x.verify.compare import Eager
from sam3x.verify.emulate import eager_in


@contextlib.contextmanager
def rounded(component: Component, numerics: Numerics, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Within it ``component`` computes with the weights that are stored, eager and captured; yields ``samples`` to match."""
    if numerics.weights is None:
        yield list(samples)
        return
    before = [sample.expected or component.eager(sample.inputs) for sample in samples]
    weights = rounded_weights([component.module], numerics.weights, lambda: component.eager(samples[0].inputs))
    with swapped([component.module], weights):
        yield [replace(sample, expected=None, unrounded=old) for sample, old in zip(samples, before, strict=True)]


def reduced(component: Component, numerics: Numerics) -> Eager | None:
    """``component`` in eager as an artifact computes it below float32; None where it computes in float32."""
    precision = numerics.arithmetic
    if precision is None:
        return None

    def eager(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with eager_in(
            precision,
            half_sums=numerics.half_sums,
            row_scales=numerics.row_scales,
            int8_convolutions=numerics.int8_convolutions,
        ):
            return component.eager(inputs)

    return eager
