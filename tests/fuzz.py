"""``make fuzz MINUTES=20``: random encoders and exports against Meta's layers, on every target, until the time is up.

What fails is shown at once, shrunk, kept in a database that the next run begins with, and printed as a script to paste.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import os
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from support.counts import too_many_failures
from support.workers import follow, say

DATABASE = Path(__file__).parents[1] / ".hypothesis" / "fuzz"
ORDERS = "orders"  # of passes; given its time as a target is
SHARES = {"onnx": 5.0}
"""Target → its share of the time, 1 unless named."""
TRIED = ("configurations", "orders of passes")
"""The counts that are shown once a minute."""
SHRINK_SECONDS = 60.0
"""How long past its time a search may make a failure simpler."""


def search(
    target: str,
    seconds: float,
    seed: int,
    *,
    shrink: bool = True,
    keep: bool = True,
    clock: Callable[[], float] = time.monotonic,
    tell: Callable[..., None] = lambda **message: None,
) -> str | None:
    """Try cases for one target until the time is up; the script of the simplest that fails, or None.

    A failure is made simpler for the rest of the time, and for ``SHRINK_SECONDS`` at least.

    Args:
        seconds: by ``clock``; by ``time.process_time`` other processes cost none of them.
        keep: begin with what failed in earlier runs, and note what fails for the next.
        tell: given ``trying=`` each case before it is tried, and the first failure at once as ``found=``.
    """
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis.database import DirectoryBasedExampleDatabase

    from support import differential
    from support.strategies import Case, cases

    found: list[str] = []
    finish = clock() + seconds

    def one(case: Case) -> None:
        nonlocal finish
        if clock() > finish:
            return  # to hypothesis, which shrinks, this case is right
        tell(trying=case.script())
        try:
            differential.check(case)
        except BaseException as error:
            script = f"{case.script()}\n{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if not found:
                tell(found=script)
                finish = max(finish, clock() + SHRINK_SECONDS)
            found[:] = [script]
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
            report_multiple_bugs=False,
        )
        try:
            seeded(seed + turn)(rules(given(cases(target))(one)))()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or not found:
                raise
            return found[0]
        turn += 1
    return None


def search_orders(seconds: float, seed: int, tell: Callable[..., None]) -> str | None:
    """Orders of passes instead of exports; the steps that lead to one whose numbers differ, or None."""
    from hypothesis import HealthCheck, settings
    from hypothesis import seed as seeded
    from hypothesis.stateful import run_state_machine_as_test

    from support.orders import Orders

    finish = time.monotonic() + seconds
    while time.monotonic() < finish:
        seed += 1
        tell(trying=f"orders of passes, seed {seed}")
        rules = settings(
            max_examples=3, stateful_step_count=6, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        try:
            run_state_machine_as_test(seeded(seed)(Orders), settings=rules)
        except Exception as error:
            return "\n".join([*getattr(error, "__notes__", []), f"{type(error).__name__}: {error}"])
    return None


def worker(target: str, seconds: float, seed: int) -> int:
    """One process, one target: says what it tries, finds and has counted (``support.workers``)."""
    import logging

    import torch

    from support.counts import COUNTS

    faulthandler.enable()  # where a native library crashes
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)

    def tell(**message: Any) -> None:
        say(**message, counts=_counted(COUNTS))

    script = search_orders(seconds, seed, tell) if target == ORDERS else search(target, seconds, seed, tell=tell)
    tell(**({} if script is None else {"failed": script}))
    return 0


def _counted(counts: Counter[str]) -> dict[str, int]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {**counts, "seconds of processor time": round(used.ru_utime + used.ru_stime)}


class Fuzz:
    """Processes side by side, each of which takes the targets in turn, a process of its own for each."""

    def __init__(self, targets: list[str], minutes: float, seed: int) -> None:
        self.targets, self.seed, self.started = targets, seed, time.monotonic()
        total = sum(SHARES.get(target, 1.0) for target in targets)
        self.seconds = {target: 60 * minutes * SHARES.get(target, 1.0) / total for target in targets}
        self.counts: dict[tuple[int, str], dict[str, int]] = {}
        self.failures = 0
        self.lock = threading.Lock()

    def run(self, workers: int) -> int:
        """The number of failures."""
        threads = [threading.Thread(target=self._targets, args=(number,), daemon=True) for number in range(workers)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            begun = time.monotonic()
            for thread in threads:
                thread.join(max(0.0, begun + 60 - time.monotonic()))
            tried = [f"{count} {name}" for name, count in self.totals().items() if name.endswith(TRIED)]
            if tried and any(thread.is_alive() for thread in threads):
                self._print(", ".join(tried))
        for name, count in self.totals().items():
            print(f"{count} {name}")
        if (said := too_many_failures(self.totals())) is not None:
            self._fail(said)
        return self.failures

    def totals(self) -> dict[str, int]:
        with self.lock:
            return dict(sorted(sum((Counter(counts) for counts in self.counts.values()), Counter()).items()))

    def _targets(self, number: int) -> None:
        for target in self.targets:
            own = ["--worker", target, "--seconds", str(self.seconds[target]), "--seed", str(self.seed + 1_000_000 * number)]
            hear = functools.partial(self._hear, (number, target))
            died = follow([sys.executable, "-W", "ignore", __file__, *own], hear)
            if died is not None:
                self._fail(f"{target}: a process {died}")

    def _hear(self, at: tuple[int, str], said: dict[str, Any]) -> None:
        with self.lock:
            self.counts[at] = said.pop("counts", self.counts.get(at, {}))
        if "found" in said:
            self._print(f"{at[1]}: found, being made simpler:\n{said['found']}")
        if "failed" in said:
            self._fail(f"failed: {at[1]}\n{said['failed']}")

    def _fail(self, text: str) -> None:
        self._print(text)
        with self.lock:
            self.failures += 1

    def _print(self, text: str) -> None:
        seconds = round(time.monotonic() - self.started)
        with self.lock:
            print(f"[{seconds // 60}:{seconds % 60:02}] {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--targets", default="", help="separated by commas; every one that works here")
    parser.add_argument("--seed", type=int, default=None, help="a run that can be repeated")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    seed = int.from_bytes(os.urandom(4), "little") if options.seed is None else options.seed
    if options.worker:
        return worker(options.worker, options.seconds, seed)

    from sam3x.targets.registry import describe_targets

    here = [*(status.name for status in describe_targets() if status.available), ORDERS]
    targets = options.targets.split(",") if options.targets else here
    print(f"fuzz: {','.join(targets)}, {options.minutes:g} minutes, {options.workers} processes, seed {seed}", flush=True)
    failures = Fuzz(targets, options.minutes, seed).run(options.workers)
    print("clean" if not failures else f"{failures} failed; the next run begins with what was kept")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
