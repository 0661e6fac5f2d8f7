"""GELU in ONNX: products in the order that ONNX Runtime fuses, inside a loop too, and numbers as near float64 as torch's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sam3x.capture.component import capture_component
from sam3x.capture.program import Sample
from sam3x.passes.pipeline import PassPipeline
from sam3x.sources.contract import Component, Port
from sam3x.targets.onnx import loop as onnx_loop
from sam3x.targets.onnx.target import OnnxOptions, OnnxTarget


class _Gelu(nn.Module):
    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (functional.gelu(x, approximate=self.approximate),)


class _FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.second(functional.gelu(self.first(x))),)


def _operators(graph: onnx.GraphProto) -> Iterator[str]:
    """Of a graph and of those inside it."""
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            yield from _operators(attribute.g)


def _lowered(module: nn.Module, x: Tensor, path: Path) -> tuple[Component, onnxruntime.InferenceSession, list[str]]:
    """The module, a session of its file, and the operators that ONNX Runtime runs."""
    port = Port(name="x", dims=("batch", None))
    component = Component(name="part", module=module.eval(), inputs=(port,), outputs=("y",), ranges={"batch": (1, 9)})
    target, chosen = OnnxTarget(), OnnxOptions()
    captured, _ = PassPipeline(target.legalization_passes(chosen)).run(
        capture_component(component, Sample(branch="fixed", case="x", inputs={"x": x}))
    )
    target.lower(captured, path, chosen)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(".run.onnx")), 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return component, session, list(_operators(onnx.load(options.optimized_model_filepath).graph))


@pytest.mark.parametrize("approximate", ("none", "tanh"))
def test_as_near_float64_as_torch(approximate: str, tmp_path: Path) -> None:
    x = torch.cat([torch.linspace(-12, 12, 3995), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38])]).reshape(4, 1000)
    component, session, _ = _lowered(_Gelu(approximate), x, tmp_path / "gelu.onnx")
    exact = component.eager_double({"x": x})["y"]
    (found,) = session.run(None, {"x": x.numpy()})
    off = (torch.from_numpy(found).double() - exact).abs() / exact.abs().clamp(min=1)
    torchs = (component.eager({"x": x})["y"].double() - exact).abs() / exact.abs().clamp(min=1)
    assert off.max() <= max(2 * torchs.max(), 1e-6)


def test_one_kernel_also_inside_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, alone = _lowered(_Gelu("none"), torch.randn(4, 8), tmp_path / "gelu.onnx")
    assert alone == ["Gelu"]
    monkeypatch.setattr(onnx_loop, "TILE_BYTES", 0)  # every hidden layer is in tiles
    x = torch.randn(4, 8)
    component, session, tiled = _lowered(_FeedForward(), x, tmp_path / "mlp.onnx")
    assert tiled.count("Loop") == 1 and tiled.count("Gelu") == 1 and "Erf" not in tiled
    (found,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), component.eager({"x": x})["y"], atol=1e-6, rtol=1e-5)
