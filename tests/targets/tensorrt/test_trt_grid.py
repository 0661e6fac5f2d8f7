"""The default encoder for every GPU, precision and form of flags, three times in a row: all of it builds."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest

from sam3x.capture.capture import capture
from sam3x.capture.program import CapturedProgram
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.pipeline.request import resolve
from sam3x.sources.encoder import default_source
from sam3x.targets.tensorrt.build import build

FLAGS: dict[str, dict[str, Any]] = {
    "fixed": {"dac": False, "pre_norm": True, "prompt_length": 32},
    "runtime": {"branches": "select"},
    "conditionals": {"branches": "cond"},
}
GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120")
TIMES = 3


@functools.cache
def default_encoder(flags: str) -> CapturedProgram:
    return capture(default_source(0).module, resolve("trt", {"compute_capability": "sm89", **FLAGS[flags]}).spec)


@pytest.mark.grid
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("flags", "precision"), itertools.product(FLAGS, ("fp32", "tf32", "fp16", "bf16")))
def test_the_default_encoder_builds_for_every_gpu_three_times_in_a_row(
    flags: str, precision: str, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batch 1:4, 72×72 tokens, prompt 1:77 or 32: what a user gets who names no sizes."""
    request = resolve("trt", {"compute_capability": "sm89", "precision": precision, **FLAGS[flags]})
    options: Any = request.options
    passes = default_pipeline(str(request.spec.branches)).then(*request.target.legalization_passes(options))
    program, _ = passes.run(default_encoder(flags))
    gpus = [gpu for gpu in GPUS if (precision, gpu) != ("bf16", "sm75")]  # refused: Turing has none
    for gpu, _ in itertools.product(gpus, range(TIMES)):
        found = build(program, options, gpu).metadata
        metrics = (
            f"| {flags} | {precision} | {gpu} | {found['activation_bytes'] / 1e6:.0f} | {found['engine_bytes'] / 1e6:.1f} "
            f"| {found['form']} |"
        )
        with capsys.disabled():
            print(metrics, flush=True)
        assert found["left_to_torch"] == 0
        wide = precision in ("fp32", "tf32") or flags != "conditionals"
        assert found["activation_bytes"] <= (400e6 if wide else 650e6), metrics
