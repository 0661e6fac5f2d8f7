"""Converters that the ONNX target brings or finds: group norms of a mask head's size, operators of torchvision."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from sam3x.capture.component import capture_component
from sam3x.capture.program import Sample
from sam3x.sources.contract import Component, Port
from sam3x.targets.onnx.target import OnnxOptions, OnnxTarget, _torchlib


class _Norm(nn.Module):
    def __init__(self, groups: int, channels: int, affine: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, affine=affine)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.norm(x),)


@pytest.mark.parametrize(
    ("shape", "affine"), [((2, 16, 288, 288), True), ((3, 16, 5, 7), False), ((2, 16, 40), True), ((2, 16), True)]
)
def test_a_group_norm_is_as_near_float64_as_torchs(shape: tuple[int, ...], affine: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    module = _Norm(2, shape[1], affine).eval()
    if affine:
        nn.init.uniform_(module.norm.weight, 0.5, 1.5, generator=generator)
        nn.init.uniform_(module.norm.bias, -0.5, 0.5, generator=generator)
    x = torch.relu(torch.randn(shape, generator=generator) + 0.3)
    port = Port(name="x", dims=("batch", *[None] * (len(shape) - 1)))
    component = Component(name="norm", module=module, inputs=(port,), outputs=("y",), ranges={"batch": (1, 4)})
    path, target = tmp_path / "norm.onnx", OnnxTarget()
    target.lower(capture_component(component, Sample(branch="fixed", case="x", inputs={"x": x})), path, OnnxOptions())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, shape[0]):
        (got,) = session.run(None, {"x": x[:batch].numpy()})
        wanted = component.eager_double({"x": x[:batch]})["y"].numpy()
        np.testing.assert_allclose(got, wanted, atol=1.5e-5)


def test_operators_of_torchvision_are_known_once_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that exported an encoder before may export a pipeline, whose prompt encoder has ``roi_align``."""
    import torchvision  # noqa: F401

    with monkeypatch.context() as before:
        before.delitem(sys.modules, "torchvision")
        without = _torchlib()
    assert _torchlib() is not without and "torchvision::roi_align" in _torchlib().functions
