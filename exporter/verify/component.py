"""A component's artifact against the source's own eager code."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sam3x.capture.program import Sample
from sam3x.errors import Sam3xError, VerificationError
from sam3x.sources.contract import Component
from sam3x.verify.compare import Eager, compare
from sam3x.verify.record import Runner, VerificationRecord


def verify_component(
    component: Component,
    open_runner: Callable[[], Runner],
    samples: Sequence[Sample],
    rounded: Eager | None = None,
    *,
    subject: str = "",
    remedy: str = "",
) -> tuple[VerificationRecord, ...]:
    """Run the artifact on every sample, then measure every output; the artifact's own copy of the weights is gone by then.

    Args:
        rounded: eager with the rounding of a precision below float32, whose rule is then decision 0010's.
        subject, remedy: of the error that says why the artifact does not run.

    Raises:
        VerificationError: the artifact cannot be opened or run.
    """
    try:
        results = _run(open_runner(), samples)
    except Sam3xError:
        raise
    except Exception as error:  # every runtime has exceptions of its own
        fact = f"the file was written and does not run: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise VerificationError(fact.rstrip("."), subject=subject, remedy=remedy) from error
    return compare(
        samples,
        lambda inputs: results.pop(id(inputs)),
        component.eager,
        exact=component.eager_double,
        rounded=rounded,
        scaled=component.scaled,
    )


def _run(runner: Runner, samples: Sequence[Sample]) -> dict[int, dict[str, Tensor]]:
    results = {}
    for sample in samples:
        arrays = {name: np.asarray(value.numpy(), order="C") for name, value in sample.inputs.items()}
        results[id(sample.inputs)] = {name: torch.from_numpy(np.array(value)) for name, value in runner.run(arrays).items()}
    return results
