"""Python's ``-W error``: a library's warning ends no export and no run, and the caller's filters are as they were."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from sam3x.warning_filters import warnings_not_raised

PROGRAM = """
import sys, warnings
import numpy as np
import sam3x
from support.upstream import encoder_of

before = list(warnings.filters)
options = {"dac": False, "pre_norm": "module", "inputs": ("tgt", "memory"), "tokens": 12, "prompt_length": 3, "batch": 1}
sam3x.export(encoder_of(1), target=sys.argv[1], output=sys.argv[2], **options)
inputs = {"tgt": np.zeros((1, 12, 32), np.float32), "memory": np.zeros((1, 3, 32), np.float32)}
sam3x.load(sys.argv[2]).run(inputs)
assert [item for item in warnings.filters if item[0] == "error"] == [item for item in before if item[0] == "error"]
"""


def raising(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A process of its own in which every warning is an error: torch's own imports, too, are part of what is tried."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-W", "error", *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("target", ["onnx", "pte"])
def test_an_export_and_a_run_where_every_warning_is_an_error(target: str, tmp_path: Path) -> None:
    done = raising(["-c", PROGRAM, target, str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_command_where_every_warning_is_an_error() -> None:
    done = raising(["-m", "sam3x", "targets"])
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_filter_that_raises_shows_and_the_others_stay() -> None:
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.filterwarnings("error", "raise", UserWarning, append=True)
        warnings.filterwarnings("ignore", "hidden", append=True)
        warnings.simplefilter("error", append=True)
        before = list(warnings.filters)
        with warnings.catch_warnings(record=True) as shown, warnings_not_raised():
            warnings.warn("raised", UserWarning, stacklevel=1)
            warnings.warn("hidden", DeprecationWarning, stacklevel=1)
            warnings.warn("another", DeprecationWarning, stacklevel=1)
            with pytest.raises(KeyError), warnings_not_raised():
                raise KeyError
        assert [str(item.message) for item in shown] == ["raised", "another"]
        assert warnings.filters == before
        with pytest.raises(UserWarning, match=re.escape("raised")):
            warnings.warn("raised", UserWarning, stacklevel=1)


def test_the_last_of_several_threads_puts_the_filters_back() -> None:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("error")
        before, entered, leave, told = list(warnings.filters), threading.Event(), threading.Event(), []

        def longer() -> None:
            with warnings_not_raised():
                entered.set()
                leave.wait(60)
                try:
                    warnings.warn("within", stacklevel=1)
                except UserWarning as error:
                    told.append(error)

        thread = threading.Thread(target=longer)
        with warnings_not_raised():
            thread.start()
            entered.wait(60)
        leave.set()
        thread.join()
        assert not told and warnings.filters == before
