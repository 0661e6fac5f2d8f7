"""``--format ep``: a torch program that holds the engine, around a stand-in where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sam3x
from sam3x.capture.capture import capture
from sam3x.targets.tensorrt import driver as trt_driver
from sam3x.targets.tensorrt import program as trt_program
from support.trt import GPU, SIZES, captured, legal, zeros_of
from support.upstream import encoder_of


class InPlaceOfTheEngine(nn.Module):
    """Called as ``TorchTensorRTModule`` is: one tensor or a tuple comes back. Output i is the first input plus i."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *inputs: Tensor) -> Any:
        found = tuple(inputs[0] + i for i in range(self.outputs))
        return found if len(found) > 1 else found[0]


EP_SPECS = {
    "tokens": SIZES,
    "feature maps": {"interface": "feature_maps", "feature_sizes": ((6, 6),), "batch": (1, 4), "prompt_length": (1, 9)},
}


@pytest.mark.parametrize("name", EP_SPECS)
def test_a_program_around_the_engine_keeps_names_and_sizes(name: str, tmp_path: Path) -> None:
    """All of ``--format ep`` but the engine's own run: sizes other than the profile's best one, every output under its name."""
    program, own = legal(
        capture(encoder_of(2), sam3x.spec.make_spec(branches="select", **EP_SPECS[name])), compute_capability="sm89"
    )
    path = tmp_path / "x.pt2"
    trt_program.save_program(InPlaceOfTheEngine(len(program.output_names)), program, path, own, "cpu")
    runner = trt_program.ProgramRunner(path, "cpu")
    batches = set()
    for sample in program.samples:
        inputs = {name: sample.inputs[name].numpy() for name in program.input_names}
        got, first = runner.run(inputs), inputs[program.input_names[0]]
        assert tuple(got) == program.output_names
        assert all(np.array_equal(value, first + np.float32(i)) for i, value in enumerate(got.values()))
        batches.add(len(first))
    assert batches - {own.opt_batch or 1}, "at the size the profile is tuned for alone"


def test_torch_tensorrt_knows_the_outputs_sizes_from_the_inputs() -> None:
    """Its own shape function, on what the export tells it; without that it cannot be exported at all."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    program, _ = legal(captured("select"), compute_capability="sm89")
    with trt_driver.named_device((8, 9)):
        trt_driver.import_torch_tensorrt()
        from torch_tensorrt.dynamo.runtime.meta_ops.register_meta_ops import _apply_symbolic_shape_expressions

        told = trt_program.shape_expressions(program)
        assert tuple(item["name"] for item in told["inputs"]) == program.input_names
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            inputs = [mode.from_tensor(program.samples[0].inputs[name]) for name in program.input_names]
            (output,) = _apply_symbolic_shape_expressions(inputs, told)
    assert tuple(output.shape) == tuple(program.samples[0].inputs["tgt"].shape) and output.dtype is torch.float32


@GPU
@pytest.mark.parametrize("name", EP_SPECS)
def test_a_program_with_the_engine_runs_and_is_verified(name: str, tmp_path: Path) -> None:
    artifact = sam3x.export(encoder_of(2), target="trt", output=tmp_path / "out", format="ep", **EP_SPECS[name])
    assert artifact.path.name == "fusion_encoder.pt2" and artifact.manifest.verified
    inputs = {name: zeros_of(artifact.manifest, name) for name in artifact.manifest.input_names}
    assert tuple(artifact.run(inputs)) == artifact.manifest.output_names
    assert tuple(sam3x.load(tmp_path / "out").run(inputs)) == artifact.manifest.output_names
