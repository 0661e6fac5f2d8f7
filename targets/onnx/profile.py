"""Time by operator of an ONNX file, from ONNX Runtime's profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3x.targets.onnx.session import open_session

if TYPE_CHECKING:
    import numpy as np


def profile(path: Path, inputs: Mapping[str, np.ndarray], runs: int, threads: int | None = None) -> list[dict[str, Any]]:
    """Run the file on the CPU with the profiler on, once to warm up.

    Returns:
        A row an operator, the slowest first: ``operator`` (ONNX Runtime's name, after it has fused nodes), ``calls`` a run,
        ``milliseconds`` a run (mean over the runs; of loops and conditionals less the nodes inside), ``share`` of all rows.
    """
    with tempfile.TemporaryDirectory(prefix="sam3x-profile-") as folder:
        session = open_session(path, threads, (), profile=Path(folder) / "run")
        for _ in range(runs + 1):
            session.run(None, dict(inputs))
        events = json.loads(Path(session.end_profiling()).read_text())
    warm = min(event["ts"] + event["dur"] for event in events if event["name"] == "model_run")
    kernels = [event for event in events if event["name"].endswith("_kernel_time") and event["ts"] >= warm]
    calls: dict[str, int] = {}
    micros: dict[str, int] = {}
    open_until: list[tuple[int, str]] = []  # of the nodes around the present one: when each ends
    for event in sorted(kernels, key=lambda item: (item["ts"], -item["dur"])):
        name = event["args"]["op_name"]
        while open_until and open_until[-1][0] <= event["ts"]:
            open_until.pop()
        if open_until:
            micros[open_until[-1][1]] -= event["dur"]
        calls[name], micros[name] = calls.get(name, 0) + 1, micros.get(name, 0) + event["dur"]
        open_until.append((event["ts"] + event["dur"], name))
    whole = sum(micros.values()) or 1
    rows = [
        {
            "operator": name,
            "calls": round(calls[name] / runs),
            "milliseconds": round(time / runs / 1000, 4),
            "share": round(time / whole, 4),
        }
        for name, time in micros.items()
    ]
    return sorted(rows, key=lambda row: -row["milliseconds"])
