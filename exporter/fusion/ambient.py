"""What the caller's own settings of torch must not change."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from sam3x.warning_filters import warnings_not_raised

_AUTOCAST = ("cpu", "cuda")
_ONE_AT_A_TIME = threading.RLock()
"""Exports, verifications and eager runs set what torch keeps for the whole process; a second thread waits for the first."""


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Run with torch as it starts up, whatever the caller has set, and without gradients.

    Set aside and put back: autocast, inference mode, gradients, the default dtype and device, ``torch.compile``, filters that
    raise warnings. One thread at a time: part of that belongs to the whole process.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        stack.enter_context(warnings_not_raised())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_dtype() is not torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
