"""What can be proven of an engine without its GPU: the graph it is built from, run in torch, in every branch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sam3x.capture.program import CapturedProgram, Sample, run_program
from sam3x.errors import Step, VerificationError
from sam3x.verify.compare import FIND_PASS, Eager, compare, require
from sam3x.verify.emulate import eager_in


def drift(captured: CapturedProgram, precision: str, samples: tuple[Sample, ...] | None = None) -> dict[str, dict[str, float]]:
    """Run the legalized graph, in its own precision, against eager; branch → ``max_abs``, ``cosine``.

    Every branch must be as near as an artifact that runs must be (``sam3x.verify``): in float32 by decision 0004; below it,
    where torch's own kernels round as TensorRT's do, by 0010.

    Raises:
        VerificationError: a branch is further off, or one of a lower precision overflows.
    """
    rounded = None if precision in ("fp32", "tf32") else functools.partial(_rounded, captured.eager, precision)
    found: dict[str, dict[str, float]] = {}
    for sample in smallest(captured) if samples is None else samples:
        got = run_program(captured.program, sample.inputs, captured.output_names)
        expected = captured.eager(sample.inputs)
        if rounded is not None:
            _refuse_overflow(sample, got, expected, precision)
        # as a large one: eager float64, which takes longest, runs only where float32 does not decide
        known = replace(sample, large=True, expected=expected)
        records = compare(
            [known],
            lambda _, got=got: got,  # type: ignore[misc]
            captured.eager,
            exact=captured.exact,
            rounded=rounded,
            scaled=captured.scaled,
        )
        require(records, Step.LOWER, "trt: the graph the engine is built from", _remedy(precision))
        found[f"{sample.branch}, {sample.case}"] = {
            "max_abs": max(record.max_abs for record in records),
            "cosine": min(_cosine(got[name], want) for name, want in expected.items()),
        }
    return found


def _rounded(eager: Eager, precision: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with eager_in(precision):
        return eager(inputs)


def _refuse_overflow(sample: Sample, got: Mapping[str, Tensor], expected: Mapping[str, Tensor], precision: str) -> None:
    if any(bool((value.isfinite() < expected[name].isfinite()).any()) for name, value in got.items()):
        raise VerificationError(
            f"branch {sample.branch}: {precision} overflows, as emulated in torch",
            subject="trt",
            remedy=_remedy(precision),
            step=Step.LOWER,
        )


def _remedy(precision: str) -> str:
    if precision in ("fp32", "tf32"):
        return FIND_PASS
    return (
        "Find the operation, and keep it in float32 (--fp32-ops): sam3x doctor FOLDER --precision "
        f"{precision}, on an export in fp32."
    )


def _cosine(got: Tensor, expected: Tensor) -> float:
    """Where both have numbers; 1 where nothing has."""
    defined = got.isfinite() & expected.isfinite()
    return distance(got[defined], expected[defined])["cosine"] if bool(defined.any()) else 1.0


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
