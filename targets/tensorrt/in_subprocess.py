"""The builder in a process of its own: it crashes on some networks, which must end an export and not the caller's program."""

from __future__ import annotations

import faulthandler
import multiprocessing
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection


class Crashed(Exception):
    """The process ended by a signal, which the message names."""


def in_subprocess(work: Callable[[], bytes | None], log: list[str]) -> bytes | None:
    """What ``work`` returns, done in a fork of this process. What it appends to ``log`` is appended here too.

    Where there is no fork, it is done here. Not for work that uses a GPU: CUDA does not survive a fork.

    Raises:
        Crashed: it ended by a signal.
    """
    if sys.platform != "linux":
        return work()
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, log, theirs))
    process.start()
    theirs.close()
    try:
        said = mine.recv()
        result = mine.recv_bytes() if said.pop() else None
        log += said
    except EOFError:
        process.join()
        code = process.exitcode or 0
        raise Crashed(signal.Signals(-code).name if code < 0 else f"exit code {code}") from None
    finally:
        mine.close()
        process.kill()  # it has nothing more to say, or is not wanted any more
        process.join()
    return result


def _work(work: Callable[[], bytes | None], log: list[str], answer: Connection) -> None:
    faulthandler.disable()  # a crash here is told by the parent
    before = len(log)
    result = work()
    answer.send([*log[before:], result is not None])
    if result is not None:
        answer.send_bytes(result)
