"""What can be proven of an engine without its GPU: the graph it is built from, run in torch, in every branch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sam3x.capture.program import CapturedProgram, Sample, run_program
from sam3x.errors import Step, VerificationError
from sam3x.verify.compare import FIND_PASS, compare, require


def drift(captured: CapturedProgram, precision: str, samples: tuple[Sample, ...] | None = None) -> dict[str, dict[str, float]]:
    """Run the legalized graph, in its own precision, against eager float32; branch → ``max_abs``, ``cosine``.

    In float32 every branch must be as near as an artifact must (``sam3x.verify``). A lower precision is emulated by torch's own
    kernels, which round where TensorRT rounds, and is measured; what is not finite is refused.

    Raises:
        VerificationError: a branch of a float32 graph is off, or one of a lower precision overflows.
    """
    samples = smallest(captured) if samples is None else samples
    if precision in ("fp32", "tf32"):  # one graph; what the GPU rounds in it is seen where it runs
        return _exact(captured, samples)
    found: dict[str, dict[str, float]] = {}
    for sample in samples:
        got = run_program(captured.program, sample.inputs, captured.output_names)
        expected = captured.eager(sample.inputs)
        metrics = [distance(got[name], expected[name]) for name in expected]
        worst = {"max_abs": max(item["max_abs"] for item in metrics), "cosine": min(item["cosine"] for item in metrics)}
        if not all(bool(value.isfinite().all()) for name, value in got.items() if bool(expected[name].isfinite().all())):
            raise VerificationError(
                f"branch {sample.branch}: {precision} overflows, as emulated in torch",
                subject="trt",
                remedy=(
                    "Find the operation, and keep it in float32 (--fp32-ops): sam3x doctor FOLDER --precision "
                    f"{precision}, on an export in fp32."
                ),
                step=Step.LOWER,
            )
        found[f"{sample.branch}, {sample.case}"] = worst
    return found


def _exact(captured: CapturedProgram, samples: tuple[Sample, ...]) -> dict[str, dict[str, float]]:
    # as large ones: eager float64, which takes longest, runs only where float32 does not decide
    lazily = [replace(sample, large=True) for sample in samples]
    records = compare(
        lazily,
        lambda inputs: run_program(captured.program, inputs, captured.output_names),
        captured.eager,
        exact=captured.exact,
    )
    require(records, Step.LOWER, "trt: the graph the engine is built from", FIND_PASS)
    found: dict[str, dict[str, float]] = {}
    for record in records:
        worst = found.setdefault(f"{record.branch}, {record.case}", {"max_abs": 0.0})
        worst["max_abs"] = max(worst["max_abs"], record.max_abs)
    return found


def distance(got: Tensor, expected: Tensor) -> dict[str, float]:
    """Largest absolute difference, and the cosine of the two as vectors."""
    left, right = got.double().flatten(), expected.double().flatten()
    cosine = torch.nn.functional.cosine_similarity(left, right, dim=0, eps=1e-30)
    return {"max_abs": float((left - right).abs().max()), "cosine": float(cosine)}


def smallest(captured: CapturedProgram) -> tuple[Sample, ...]:
    """The capture's samples cut to the smallest batch that each branch takes, and one whose prompt is all padding."""
    low, high = captured.ranges.get("batch", (1, 1))
    cut = []
    for sample in captured.samples:
        batch = min(high, max(low, 2)) if captured.even_dimension(sample.inputs) == "batch" else low
        cut.append(_cut(captured, sample, batch))
    masks = [name for name in captured.input_names if name.endswith("key_padding_mask") and not name.startswith(("tgt", "src"))]
    if masks and cut:
        first = cut[0]
        inputs = {name: torch.ones_like(value) if name in masks else value for name, value in first.inputs.items()}
        cut.append(Sample(branch=first.branch, case=f"{first.case}, all padded", inputs=inputs, all_padded=True))
    return tuple(cut)


def _cut(captured: CapturedProgram, sample: Sample, batch: int) -> Sample:
    inputs: dict[str, Any] = {}
    for node in captured.program.graph.nodes:
        if node.op == "placeholder" and node.name in sample.inputs:
            value = sample.inputs[node.name]
            for axis, size in enumerate(node.meta["val"].shape):
                if not isinstance(size, int) and captured.dim_names.get(str(size)) == "batch":
                    value = value.narrow(axis, 0, min(batch, value.shape[axis]))
            inputs[node.name] = value.contiguous()
    tokens = next(iter(inputs.values())).shape
    return Sample(branch=sample.branch, case=f"{tuple(tokens)}", inputs=inputs)
