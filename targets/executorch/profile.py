"""Time by operator of a .pte, from ExecuTorch's event tracer (ETDump)."""

from __future__ import annotations

import re
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_METHOD = re.compile(r"^(Method::|Program::|DELEGATE_CALL|OPERATOR_CALL$)")
_NUMBER = re.compile(r" #\d+$")


def profile(path: Path, tensors: list[torch.Tensor], runs: int) -> list[dict[str, Any]]:
    """Run ``forward`` with the event tracer on, once to warm up.

    Returns:
        A row an operator, the slowest first: ``operator`` (a delegate's own name for it, or ``portable …``), ``calls`` a run,
        ``milliseconds`` a run (median over the runs, summed over the calls), ``share`` of all rows.
    """
    from executorch.devtools import Inspector
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(str(path), enable_etdump=True)
    method = program.load_method("forward")
    assert method is not None
    for _ in range(runs + 1):
        method.execute(tensors)
    with tempfile.TemporaryDirectory(prefix="sam3x-profile-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tensors were not recorded
        trace = Path(folder) / "trace.etdp"
        program.write_etdump_result_to_file(str(trace), str(Path(folder) / "debug.bin"))
        blocks = Inspector(etdump_path=str(trace)).event_blocks
    events = [event for block in blocks if block.name == "Execute" for event in block.events if event.perf_data is not None]
    totals: dict[str, list[float]] = {}
    for event in events:
        if not _METHOD.match(event.name):
            name = _NUMBER.sub("", event.name).replace("native_call_", "portable ")
            totals.setdefault(name, []).append(float(event.perf_data.p50))
    whole = sum(map(sum, totals.values())) or 1.0
    rows = [
        {"operator": name, "calls": len(times), "milliseconds": round(sum(times), 4), "share": round(sum(times) / whole, 4)}
        for name, times in totals.items()
    ]
    return sorted(rows, key=lambda row: -row["milliseconds"])
