"""Rows that are padded, and rows picked by number, at another batch than the traced one, in every precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam3x.capture.component import capture_component
from sam3x.capture.program import Sample
from sam3x.passes.pipeline import PassPipeline
from sam3x.sources.contract import Component, Port
from sam3x.targets.executorch.target import PteOptions, PteTarget


class _Rows(nn.Module):
    """A token in front of the others, which no delegate computes; rows in the order of numbers that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        rows = torch.arange(x.shape[0], device=x.device) + 0
        return (F.pad(self.linear(x), (0, 0, 1, 0), value=1.0)[rows].cumsum(1),)


@pytest.mark.parametrize(("precision", "furthest"), [("fp32", 1e-5), ("fp16", 1e-2), ("int8", 5e-2)])
def test_sizes_stay_dynamic(precision: str, furthest: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = _Rows().eval(), torch.rand(2, 5, 8)
    port = Port(name="x", dims=("batch", None, None))
    component = Component(name="rows", module=module, inputs=(port,), outputs=("y",), ranges={"batch": (1, 4)})
    target, options, path = PteTarget(), PteOptions(precision=precision), tmp_path / "rows.pte"
    captured, _ = PassPipeline(target.legalization_passes(options)).run(
        capture_component(component, Sample(branch="fixed", case="x", inputs={"x": x}))
    )
    target.lower(captured, path, options)
    runner = target.load_runner(path)
    for batch in (1, 2, 4):
        given = torch.rand(batch, 5, 8)
        wanted = component.eager({"x": given})["y"].detach().numpy()
        np.testing.assert_allclose(runner.run({"x": given.numpy()})["y"], wanted, atol=furthest)
