"""A .pte with test inputs and expected outputs in it (a bundled program): a device can check itself."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sam3x.capture.program import CapturedProgram
from sam3x.passes.graph.aten_nodes import expression


def bundle(captured: CapturedProgram, path: Path) -> list[str]:
    """Write ``path`` with the suffix ``.bpte``: one case a branch at the smallest batch that it takes, outputs from eager.

    Returns:
        What each test set is, in order.
    """
    from executorch.devtools import BundledProgram
    from executorch.devtools.bundled_program.config import MethodTestCase, MethodTestSuite
    from executorch.devtools.bundled_program.serialize import serialize_from_bundled_program_to_flatbuffer

    dims = _dims(captured)
    cases, names = [], []
    for sample in captured.samples:
        inputs = _cut(sample.inputs, dims, captured)
        if inputs is not None:
            outputs = captured.eager(inputs)
            cases.append(MethodTestCase(list(inputs.values()), [outputs[name].contiguous() for name in captured.output_names]))
            names.append(sample.branch)
    program = BundledProgram(None, [MethodTestSuite("forward", cases)], str(path))
    path.with_suffix(".bpte").write_bytes(serialize_from_bundled_program_to_flatbuffer(program))
    return names


def _dims(captured: CapturedProgram) -> dict[str, list[str | None]]:
    """Input name → what each of its dimensions means, None where it is fixed."""
    return {
        node.name: [captured.dim_names.get(str(expression(size))) for size in node.meta["val"].shape]
        for node in captured.program.graph.nodes
        if node.op == "placeholder" and node.name in captured.input_names
    }


def _cut(inputs: dict[str, Tensor], dims: dict[str, list[str | None]], captured: CapturedProgram) -> dict[str, Tensor] | None:
    """A branch sample, made at the traced sizes, cut to sizes inside the ranges; None where its dac has no even one."""
    sizes = {name: low if name in ("batch", "prompts", "images") else high for name, (low, high) in captured.ranges.items()}
    if captured.even_dimension(inputs) == "batch":
        sizes["batch"] += sizes["batch"] % 2
        if sizes["batch"] > captured.ranges["batch"][1]:
            return None
    result = {}
    for name, value in inputs.items():
        for dim, meaning in enumerate(dims[name]):
            if meaning is not None:
                value = value.narrow(dim, 0, min(sizes[meaning], value.shape[dim]))
        result[name] = value.contiguous().clone()
    return {name: torch.as_tensor(value) for name, value in result.items()}
