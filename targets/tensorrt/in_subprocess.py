"""The builder in a process of its own: it crashes on some networks, which must end an export and not the caller's program.

The process is started afresh, never forked: a fork of a process with threads may hang, and Windows has none. It runs no code of
the caller's main module, so that a script needs no ``if __name__ == "__main__"``. It stays for the next engine (importing
Torch-TensorRT takes seconds, and a pipeline has six) and ends with the caller, or after a minute without work.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
IDLE = 60.0
"""Seconds that the process waits for another engine."""


class Crashed(Exception):
    """The process ended in the middle of its work: by which signal, or with which exit code."""


def in_subprocess(work: Callable[..., T], *args: Any) -> T:
    """Return ``work(*args)``, run in the other process. Both are handed over by pickle; one caller at a time.

    Raises:
        Crashed: the process ended. Whatever ``work`` raises.
    """
    global _process
    with _lock:
        if _process is None or _process.owner != os.getpid() or _process.ended:  # a fork has no part in its parent's
            _process = _Process()
        process = _process
        process.wanted()
        try:
            done, result = process.ask((work, args))
        except BaseException:  # crashed, or interrupted halfway
            process.close()
            _process = None
            raise
        process.idle()
    if not done:
        raise result
    return result  # type: ignore[no-any-return]


class _Process:
    """A Python that runs ``serve``."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        self._popen = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )
        self._timer: threading.Timer | None = None

    @property
    def ended(self) -> bool:
        return self._popen.poll() is not None

    def ask(self, request: Any) -> tuple[bool, Any]:
        data = pickle.dumps(request)
        try:
            self._popen.stdin.write(data)  # type: ignore[union-attr]
            self._popen.stdin.flush()  # type: ignore[union-attr]
            return pickle.load(self._popen.stdout)  # type: ignore[arg-type,no-any-return]
        except (EOFError, OSError, pickle.UnpicklingError):
            code = self._popen.wait()
            raise Crashed(self._reason(code)) from None

    def _reason(self, code: int) -> str:
        if code < 0:
            return signal.Signals(-code).name
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"exit code {code if code < 1 << 16 else hex(code)}" + (f": {last}" if last else "")

    def wanted(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def idle(self) -> None:
        self._timer = threading.Timer(IDLE, _end, [self])
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        self.wanted()
        self._popen.kill()
        self._popen.wait()
        for stream in (self._popen.stdin, self._popen.stdout, self._said):
            with contextlib.suppress(OSError):  # what could not be written to it any more
                stream.close()  # type: ignore[union-attr]


_process: _Process | None = None
_lock = threading.Lock()


@atexit.register
def close() -> None:
    """End the process, if there is one."""
    if _process is not None:
        _end(_process)


def _end(process: _Process) -> None:
    global _process
    with _lock:
        if _process is process and process.owner == os.getpid():
            process.close()
            _process = None


def serve() -> None:
    """Answer requests on standard input until it ends; what is printed meanwhile is no answer."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            work, args = pickle.load(requests)
        except EOFError:
            return
        try:
            result = True, work(*args)
        except Exception as error:
            result = False, error
        try:
            data = pickle.dumps(result)
            pickle.loads(data)
        except Exception:  # an error of native code that pickle does not take
            data = pickle.dumps((False, RuntimeError(f"{type(result[1]).__name__}: {result[1]}")))
        answers.write(data)
        answers.flush()
