"""``torch_tensorrt`` without a driver: answers to what it asks of a GPU, for as long as it is imported and converts."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

from sam3x.errors import LoweringError

_MEMORY = 16 << 30
"""Bytes of memory of the GPU that is named; torch_tensorrt only warns below half of it."""


@contextlib.contextmanager
def named_device(capability: tuple[int, int]) -> Iterator[None]:
    """Answer for a GPU of ``capability`` (major, minor) where there is none.

    ``import torch_tensorrt`` and its converter ask ``torch.cuda`` for the current device, its capability, properties and free
    memory. Those four functions are replaced, nothing else is, and they come back when the block ends, also by an error. Where
    a GPU is there nothing is touched. ``logging.captureWarnings`` and ``warnings.showwarning``, which the import changes,
    come back too.
    """
    import warnings

    import torch

    shown, held = warnings.showwarning, logging._warnings_showwarning  # type: ignore[attr-defined]
    before: dict[str, Any] = {}
    if not torch.cuda.is_available():
        major, minor = capability
        properties = types.SimpleNamespace(name=f"sm{major}{minor}", major=major, minor=minor, total_memory=_MEMORY)
        answers = {
            "current_device": lambda: 0,
            "get_device_capability": lambda device=None: capability,
            "get_device_properties": lambda device=None: properties,
            "mem_get_info": lambda device=None: (_MEMORY, _MEMORY),
        }
        before = {name: getattr(torch.cuda, name) for name in answers}
        for name, answer in answers.items():
            setattr(torch.cuda, name, answer)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torch.cuda, name, function)
        warnings.showwarning = shown
        logging._warnings_showwarning = held  # type: ignore[attr-defined]


def import_torch_tensorrt() -> Any:
    """``torch_tensorrt``, to be called inside ``named_device``."""
    from sam3x.targets.quiet import errors_only, native_silence

    if "torch_tensorrt" in sys.modules:
        return sys.modules["torch_tensorrt"]
    chatty = ("torch_tensorrt", "torch_tensorrt.dynamo.conversion.aten_ops_converters", "torch._opaque_base", "torch")
    # where there is no driver its runtime says so, whatever logger is set how
    with errors_only(*chatty), contextlib.nullcontext() if gpu_count() else native_silence():
        import torch_tensorrt
    return torch_tensorrt


@functools.cache
def gpu_count() -> int:
    """NVIDIA GPUs that the driver sees; asked of the driver itself, so that torch is not imported."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def this_gpu() -> str:
    """``sm89`` for the GPU of this machine.

    Raises:
        LoweringError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise LoweringError("there is no GPU here", subject="trt", remedy="Name one: --compute-capability sm89")
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"
