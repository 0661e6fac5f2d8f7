"""What tests have a process of the TensorRT builder do."""

from __future__ import annotations

import os

from sam3x.errors import LoweringError


def double(value: bytes) -> bytes:
    """Twice as many bytes."""
    return value * 2


def end(code: int) -> None:
    """Leave the process, by signal ``-code`` where that is below 0."""
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


def refuse() -> None:
    """Fail as the target does."""
    raise LoweringError("no such layer", subject="trt", remedy="Take another.")


class Unpicklable(Exception):
    """As of native code: pickle does not take it."""


def native() -> None:
    """Fail as native code does."""
    raise Unpicklable(lambda: None)


def chatter(said: str) -> int:
    """Print, as native code does, and say whose process this is."""
    print(said, flush=True)
    return os.getpid()
