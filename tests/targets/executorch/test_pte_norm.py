"""Group norms of a mask head's size in a .pte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sam3x.capture.component import capture_component
from sam3x.capture.program import Sample
from sam3x.passes.pipeline import PassPipeline
from sam3x.sources.contract import Component, Port
from sam3x.targets.executorch.target import PteOptions, PteTarget


class _Norm(nn.Module):
    def __init__(self, groups: int, channels: int, affine: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, affine=affine)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.norm(x),)


@pytest.mark.parametrize(
    ("shape", "affine"), [((2, 16, 288, 288), True), ((3, 16, 5, 7), False), ((2, 16, 40), True), ((2, 16), True)]
)
def test_a_group_norm_over_a_large_map_is_as_near_float64_as_torchs(
    shape: tuple[int, ...], affine: bool, tmp_path: Path
) -> None:
    """ExecuTorch's own sums 663,552 elements in one float32, and their squares in another: 3e-3 off here."""
    generator = torch.Generator().manual_seed(0)
    module = _Norm(2, shape[1], affine).eval()
    if affine:
        nn.init.uniform_(module.norm.weight, 0.5, 1.5, generator=generator)
        nn.init.uniform_(module.norm.bias, -0.5, 0.5, generator=generator)
    x = torch.relu(torch.randn(shape, generator=generator) + 0.3)
    port = Port(name="x", dims=("batch", *[None] * (len(shape) - 1)))
    component = Component(name="norm", module=module, inputs=(port,), outputs=("y",), ranges={"batch": (1, 4)})
    target, options, path = PteTarget(), PteOptions(), tmp_path / "norm.pte"
    captured, _ = PassPipeline(target.legalization_passes(options)).run(
        capture_component(component, Sample(branch="fixed", case="x", inputs={"x": x}))
    )
    metadata = target.lower(captured, path, options)
    assert metadata["delegates"] == 1 and not metadata["portable"]
    runner = target.load_runner(path)
    for batch in (1, shape[0]):
        wanted = component.eager_double({"x": x[:batch]})["y"].numpy()
        np.testing.assert_allclose(runner.run({"x": x[:batch].numpy()})["y"], wanted, atol=1.5e-5)
