"""When an output counts as equal (decision 0004)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sam3x.capture.program import Sample
from sam3x.verify.compare import compare


@pytest.mark.parametrize(("off", "passed"), [(1e-5, True), (1e-4, True), (1e-3, False)])
def test_eager_that_is_near_float64_by_chance_is_measured_again(off: float, passed: bool) -> None:
    """A thousand times one is exact in float32, but not a thousand times its neighbours, which are 1.2e-4 away."""

    def eager(inputs: Any) -> dict[str, Tensor]:
        return {"output": inputs["tgt"] * 1000}

    sample = Sample(branch="fixed", case="ones", inputs={"tgt": torch.ones(2, 3)})
    (record,) = compare([sample], lambda inputs: {"output": eager(inputs)["output"] + off}, eager)
    assert record.passed is passed


def test_the_inputs_that_are_moved_are_copies() -> None:
    given = torch.ones(2, 3)
    sample = Sample(branch="fixed", case="ones", inputs={"tgt": given})
    compare([sample], lambda inputs: {"output": inputs["tgt"] + 1}, lambda inputs: {"output": inputs["tgt"] * 1})
    assert torch.equal(given, torch.ones(2, 3))
