"""Processes of ``make fuzz`` and what they say: one JSON message a line, so that a native crash loses nothing already said."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import Any


def say(**message: Any) -> None:
    """From a worker to the process that started it."""
    print(json.dumps(message), flush=True)


def follow(command: Sequence[str], hear: Callable[[dict[str, Any]], None]) -> str | None:
    """Run a worker and pass on each message as it comes.

    Returns:
        How it died, with the last case it named and the end of its stderr; None where it ended by itself.
    """
    trying = ""
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, errors="replace")
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                message = _message(line)
                trying = message.pop("trying", trying)
                if message:
                    hear(message)
        if process.wait() == 0:
            return None
        stderr.seek(0)
        said = "".join(stderr.readlines()[-60:]).rstrip()
    return "\n".join(part for part in (f"died of {_cause(process.returncode)}, while it tried", trying, said) if part)


def _message(line: str) -> dict[str, Any]:
    """Nothing for what a native library prints on its own."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _cause(code: int) -> str:
    try:
        return f"{signal.Signals(-code).name} (rc {code})"
    except ValueError:
        return f"an error (rc {code})"
