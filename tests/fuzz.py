"""``make fuzz MINUTES=20``: random encoders and exports against Meta's layers, on every target, until the time is up.

What fails is shrunk, kept in a database that the next run begins with, and printed as a script to paste.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

DATABASE = Path(__file__).parents[1] / ".hypothesis" / "fuzz"
FAILED = "failed: "
ORDERS = "orders"  # of passes; given its time as a target is


def search(
    target: str,
    seconds: float,
    seed: int,
    *,
    shrink: bool = True,
    keep: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> str | None:
    """Try cases for one target until the time is up; the script of the simplest that fails, or None.

    Args:
        seconds: by ``clock``; by ``time.process_time`` other processes cost none of them.
        keep: begin with what failed in earlier runs, and note what fails for the next.
    """
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis.database import DirectoryBasedExampleDatabase

    from support.differential import check
    from support.strategies import Case, cases

    found: list[str] = []
    finish = clock() + seconds

    def one(case: Case) -> None:
        if not found and clock() > finish:
            return
        try:
            check(case)
        except BaseException as error:
            found[:] = [f"{case.script()}\n{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"]
            raise

    turn = 0
    while clock() < finish:
        rules = settings(
            max_examples=50,
            deadline=None,
            database=DirectoryBasedExampleDatabase(DATABASE / target) if keep else None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.reuse, Phase.generate, *([Phase.shrink] if shrink else [])],
            print_blob=False,
        )
        try:
            seeded(seed + turn)(rules(given(cases(target))(one)))()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or not found:
                raise
            return found[0]
        turn += 1
    return None


def search_orders(seconds: float, seed: int) -> str | None:
    """Orders of passes instead of exports; the steps that lead to one whose numbers differ, or None."""
    from hypothesis import HealthCheck, settings
    from hypothesis import seed as seeded
    from hypothesis.stateful import run_state_machine_as_test

    from test_pipeline_orders import Orders

    finish = time.monotonic() + seconds
    while time.monotonic() < finish:
        seed += 1
        rules = settings(
            max_examples=3, stateful_step_count=6, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        try:
            run_state_machine_as_test(seeded(seed)(Orders), settings=rules)
        except Exception as error:
            return "\n".join([*getattr(error, "__notes__", []), f"{type(error).__name__}: {error}"])
    return None


def worker(targets: list[str], minutes: float, seed: int) -> int:
    """One process: the targets in turn, ONNX with most of the time."""
    import logging

    import torch

    from support.differential import COUNTS

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    shares = {"onnx": 4.0}
    total = sum(shares.get(target, 1.0) for target in targets)
    failed = 0
    for target in targets:
        share = 60 * minutes * shares.get(target, 1.0) / total
        script = search_orders(share, seed) if target == ORDERS else search(target, share, seed)
        if script is not None:
            failed += 1
            print(f"{FAILED}{target}\n{script}", flush=True)
    used = resource.getrusage(resource.RUSAGE_SELF)
    COUNTS["seconds of processor time"] = round(used.ru_utime + used.ru_stime)
    for name, count in sorted(COUNTS.items()):
        print(f"count: {count} {name}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--targets", default="", help="separated by commas; every one that works here")
    parser.add_argument("--seed", type=int, default=None, help="a run that can be repeated")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    seed = int.from_bytes(os.urandom(4), "little") if options.seed is None else options.seed
    if options.worker:
        return worker(options.targets.split(","), options.minutes, seed)

    from sam3x.targets.registry import describe_targets

    here = [*(status.name for status in describe_targets() if status.available), ORDERS]
    targets = options.targets or ",".join(here)
    print(f"fuzz: {targets}, {options.minutes:g} minutes, {options.workers} processes, seed {seed}", flush=True)
    own = [sys.executable, "-W", "ignore", __file__, "--worker", "--targets", targets, "--minutes", str(options.minutes)]
    processes = [
        subprocess.Popen(
            [*own, "--seed", str(seed + 1_000_000 * number)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for number in range(options.workers)
    ]
    counts: Counter[str] = Counter()
    code = 0
    for process in processes:
        text, _ = process.communicate()
        for line in text.splitlines():
            if line.startswith("count: "):
                number, _, name = line.removeprefix("count: ").partition(" ")
                counts[name] += int(number)
            else:
                print(line)
        code = code or process.returncode
    for name, number in sorted(counts.items()):
        print(f"{number} {name}")
    print("clean" if not code else "something failed; the next run begins with it")
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
