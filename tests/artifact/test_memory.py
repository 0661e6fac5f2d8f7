"""Resident memory of this process, now and at its peak."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from sam3x.artifact import memory


def test_the_peak_keeps_what_was_given_back() -> None:
    before = memory.peak_memory()
    held = np.ones(before + (64 << 20), dtype=np.uint8)
    del held
    assert memory.peak_memory() >= before + (64 << 20)
    assert 0 < memory.memory_now() < memory.peak_memory()


def test_other_systems_tell_the_peak_in_their_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(memory.Path, "read_text", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    counted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert memory.peak_memory() >= counted * 1024
    monkeypatch.setattr(sys, "platform", "darwin")  # the same number is bytes there
    assert counted <= memory.peak_memory() < counted * 1024
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory.peak_memory() == pytest.approx(memory.memory_now(), rel=0.2)
    windows = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123))
    monkeypatch.setattr(psutil, "Process", lambda *_: windows)
    assert memory.peak_memory() == 123
