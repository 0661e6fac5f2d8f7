"""One export into a folder at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOCK = ".sam3x-lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against other exports; the kernel lets go when the process ends, however it ends.

    The lock is on the folder itself, so no file is left; on Windows on a file in it, which is removed. A file system without
    locks is used without.

    Raises:
        BlockingIOError: another process holds it.
    """
    if fcntl is None:
        try:
            with FileLock(folder / _LOCK, timeout=0):
                yield
        except Timeout as error:
            raise BlockingIOError(str(error)) from error
        return
    while True:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            lock_file(descriptor)  # on a network file system the rename to JOURNAL still lets only one export through
            if not folder.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                folder.mkdir(parents=True, exist_ok=True)  # another export failed and took its folder away
                continue
            yield
            return
        finally:
            os.close(descriptor)


def lock_file(descriptor: int) -> None:
    """Hold an open file, on systems and file systems that have locks, until it is closed.

    Raises:
        BlockingIOError: another process holds it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # a file system without locks
