"""Tell the resident memory of this process, on any system."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil


def memory_now() -> int:
    """Return the resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Return the highest resident bytes of this process so far; on a system that keeps no peak, those of now.

    Linux: ``VmHWM``, as ``ru_maxrss`` of a child begins at its parent's. Windows: ``peak_wset``. macOS: ``ru_maxrss``, which is
    bytes there.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    windows = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if windows is not None:
        return int(windows)
    try:
        import resource  # POSIX alone
    except ImportError:
        return memory_now()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
