"""The parent's end of one ``sam3x.bench.worker``: start it, ask it, end it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

PAUSE = 0.05
"""Seconds between two runs."""


class ContenderError(Exception):
    """What happened to one contender, in one sentence; it goes into the report, never to the user as an error."""


class Worker:
    """A running contender.

    Args:
        job: the worker's first line.
        environment: on top of this process's own.
        timeout: seconds that one answer may take; then the process is killed.
    """

    def __init__(self, job: Mapping[str, Any], environment: Mapping[str, str], timeout: float) -> None:
        self.timeout = timeout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - close() ends it
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sam3x.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # safe path: with -m, a folder called onnx in the current directory would be taken for the package
            env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
            start_new_session=True,  # so that Ctrl-C reaches this process alone
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        )
        self._send(job)

    def until(self, event: str) -> dict[str, Any]:
        """Read up to that event.

        Raises:
            ContenderError: it reported an error, ended, or took too long.
        """
        late = threading.Event()

        def end() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(self.timeout, end)
        timer.start()
        step = "start"
        try:
            while line := self._out.readline():
                message = json.loads(line)
                if message["event"] == "error":
                    raise ContenderError(f"{message['step']}: {message['message']}")
                if message["event"] == event:
                    return message
                step = message["event"]
        finally:
            timer.cancel()
        if late.is_set():
            raise ContenderError(f"no answer in {self.timeout:g} s after '{step}'")
        raise ContenderError(f"{self._ending()} after '{step}'{self._last_words()}")

    def run(self) -> tuple[float, float]:
        """One timed run: wall and CPU seconds. The pause lets the threads of the one before it stop spinning."""
        time.sleep(PAUSE)
        self._send({"do": "run"})
        answer = self.until("ran")
        return answer["seconds"], answer["cpu_seconds"]

    def finish(self) -> dict[str, Any]:
        """Its memory figures and its profile; the process ends."""
        self._send({"do": "quit"})
        return self.until("done")

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._kill()
        with contextlib.suppress(OSError):
            self._in.close()
        self._out.close()
        self._process.wait()
        self._errors.close()

    @property
    def _in(self) -> Any:
        return self._process.stdin

    @property
    def _out(self) -> Any:
        return self._process.stdout

    def _send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # reading tells why
            self._in.write(json.dumps(message).encode() + b"\n")
            self._in.flush()

    def _kill(self) -> None:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self._process.pid)
            for item in [*process.children(recursive=True), process]:  # a compiler that it started ends with it
                with contextlib.suppress(psutil.Error):
                    item.kill()

    def _ending(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(10)
            if code >= 0:
                return f"the process ended with code {code}"
            with contextlib.suppress(ValueError):
                return f"the process was ended by {signal.Signals(-code).name}"
        return "the process ended"

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()[:300]}" if lines else ""


@contextlib.contextmanager
def workers_closed(workers: Mapping[str, Worker]) -> Iterator[None]:
    """Whatever happens, no process stays behind."""
    try:
        yield
    finally:
        for worker in workers.values():
            worker.close()
