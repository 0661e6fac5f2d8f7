"""torch.cuda is answered for while an engine is built, and is itself again afterwards; what native code says."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sam3x.errors import LoweringError
from sam3x.pipeline.request import resolve
from sam3x.targets import quiet
from sam3x.targets.tensorrt import driver as trt_driver
from sam3x.targets.tensorrt.target import TrtTarget
from support.trt import NO_GPU, SMALL, captured, lower, with_unknown

CUDA = ("current_device", "get_device_capability", "get_device_properties", "mem_get_info", "is_available", "device_count")


@pytest.fixture
def cuda() -> Iterator[dict[str, Any]]:
    before = {name: getattr(torch.cuda, name) for name in CUDA}
    yield before
    assert {name: getattr(torch.cuda, name) for name in CUDA} == before


@NO_GPU
def test_torch_cuda_is_answered_for_inside_and_itself_afterwards(cuda: Any) -> None:
    shown = warnings.showwarning
    with pytest.raises(ZeroDivisionError), trt_driver.named_device((8, 9)):
        assert torch.cuda.get_device_capability() == (8, 9) and torch.cuda.get_device_properties(0).major == 8
        logging.captureWarnings(True)
        assert not torch.cuda.is_available()
        1 / 0  # noqa: B018
    assert warnings.showwarning is shown and logging._warnings_showwarning is None


def test_torch_cuda_is_untouched_where_a_gpu_is_there(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with trt_driver.named_device((8, 9)):
        assert torch.cuda.get_device_capability is cuda["get_device_capability"]
    monkeypatch.undo()


def test_an_export_and_a_failed_one_leave_torch_cuda_alone(cuda: Any, tmp_path: Path) -> None:
    lower(captured("select"), tmp_path / "x.engine")
    with pytest.raises(LoweringError):
        TrtTarget().lower(with_unknown(captured("select")), tmp_path / "y.engine", resolve("trt", SMALL).options)


def test_what_native_code_says_is_dropped_unless_it_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet.native_silence():
        os.write(2, b"a warning")
    with pytest.raises(ZeroDivisionError), quiet.native_silence():
        os.write(2, b"the reason")
        1 / 0  # noqa: B018
    os.write(2, b", and on")
    assert capfd.readouterr().err == "the reason, and on"
