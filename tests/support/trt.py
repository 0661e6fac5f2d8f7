"""What tests of the TensorRT target share: a small encoder captured once, lowered as the target lowers it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from sam3x.capture.capture import capture
from sam3x.capture.program import CapturedProgram
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.pipeline.request import resolve
from sam3x.spec import make_spec
from sam3x.targets.tensorrt.target import TrtTarget
from support.upstream import encoder_of

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU is told")
SIZES = {"tokens": 36, "batch": (1, 4), "prompt_length": (1, 9)}
SMALL = {**SIZES, "compute_capability": "sm89"}


@functools.cache
def captured(form: str) -> CapturedProgram:
    """Two layers at ``SIZES``, flags in the form ``select`` or ``cond``."""
    return capture(encoder_of(2), make_spec(branches=form, **SIZES))


def legal(captured: CapturedProgram, *, branches: str = "select", **options: Any) -> tuple[CapturedProgram, Any]:
    """The program as the target lowers it with runtime flags in the form ``branches``, and the options."""
    request = resolve("trt", {**captured.ranges, **options})
    own: Any = request.options
    pipeline = default_pipeline(branches).then(*request.target.legalization_passes(own))
    return pipeline.run(captured)[0], own


def lower(captured: CapturedProgram, path: Path, **options: Any) -> dict[str, Any]:
    """The metadata of the engine that is written to ``path``, for sm89."""
    program, own = legal(captured, compute_capability="sm89", **options)
    return {**TrtTarget().prove(program, own), **TrtTarget().lower(program, path, own)}


def with_unknown(captured: CapturedProgram) -> CapturedProgram:
    """The program with an operator that has no form in TensorRT."""
    program = default_pipeline("select").run(captured)[0]
    node = next(node for node in program.program.graph.nodes if node.target is torch.ops.aten.relu.default)
    node.target = torch.ops.aten.special_bessel_j0.default
    return program


def zeros_of(manifest: Any, name: str) -> Any:
    """An input of zeros, of the shape and type that the manifest states."""
    item = next(item for item in manifest.inputs if item.name == name)
    sizes = {"batch": 2, "tokens": 36, "prompt_length": 3}
    return torch.zeros([sizes.get(str(size), size) for size in item.shape], dtype=getattr(torch, item.dtype))
