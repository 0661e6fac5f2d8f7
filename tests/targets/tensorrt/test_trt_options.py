"""Options of the TensorRT target: what is refused at once, how a GPU is named, what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sam3x
from sam3x.errors import SpecError, TargetUnavailableError
from sam3x.pipeline.request import resolve
from sam3x.targets.tensorrt import target as trt_target
from sam3x.targets.tensorrt.target import TrtTarget
from support.trt import NO_GPU, SMALL
from support.upstream import encoder_of


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compute_capability": "sm42"}, r"no GPU 'sm42'.*sm75.*sm121"),
        ({"compute_capability": "sm89", "opt_batch": 9}, r"--opt-batch 9 is outside batch 1:4"),
        ({"compute_capability": "sm89", "opt_prompt_length": 78}, r"--opt-prompt-length 78 is outside"),
        ({"compute_capability": "sm89", "fp32_ops": "layer_norm"}, r"everything is float32 already"),
        ({"compute_capability": "sm89", "precision": "int8"}, r"precision"),
        ({"compute_capability": "sm75", "precision": "bf16"}, r"sm75 \(Turing\) computes in no bfloat16.*--precision fp16"),
        pytest.param({}, r"no GPU here.*--compute-capability sm89", marks=NO_GPU),
        pytest.param({"compute_capability": "sm89", "format": "ep"}, r"--format ep loads the engine", marks=NO_GPU),
    ],
)
def test_bad_options_are_told_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        resolve(TrtTarget(), options)


@pytest.mark.parametrize("written", ["SM89", "8.9", "sm_89", "89"])
def test_a_gpu_may_be_written_in_many_ways(written: str) -> None:
    assert resolve("trt", {"compute_capability": written}).options.compute_capability == "sm89"


def test_without_the_extra_the_install_command_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trt_target, "distribution", lambda: None)
    status = TrtTarget().availability()
    assert not status.available and "sam3x[trt-rtx]" in status.install and "torch_tensorrt" in status.detail
    with pytest.raises(TargetUnavailableError, match=r"missing torch_tensorrt.*sam3x\[trt-rtx\]"):
        sam3x.export(encoder_of(1), target="trt", output=tmp_path / "out", **SMALL)


@NO_GPU
def test_tensorrt_itself_needs_the_gpu_that_it_builds_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_target, "distribution", lambda: "torch-tensorrt")
    monkeypatch.setattr(trt_target, "version", lambda name: "2.14.0")
    assert not TrtTarget().availability().available
    with pytest.raises(TargetUnavailableError, match=r"TensorRT-RTX.*sam3x\[trt-rtx\]"):
        resolve(TrtTarget(), {"compute_capability": "sm89"})


def test_the_status_imports_nothing_heavy() -> None:
    code = "import sys; from sam3x.targets.tensorrt.target import TrtTarget; "
    code += "print(TrtTarget().availability().detail, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "TensorRT" in done.stdout and done.stdout.strip().endswith("False"), done.stderr
