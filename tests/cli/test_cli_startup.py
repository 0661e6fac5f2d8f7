"""The command line before it does anything: help and bad input are quick and import nothing heavy."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sam3x import __version__
from support.command_line import run

HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy", "rich")
PROBE = f"""
import sys
from sam3x.cli.app import main
try:
    main()
except SystemExit as end:
    print(end.code or 0, sorted(set(sys.modules) & set({HEAVY})))
"""


def seconds_of(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def test_help_is_quick() -> None:
    """A ratio, in turn: on an idle machine 2.3 times what importing Typer and pydantic takes; torch would make it 20."""
    commands = (("-m", "sam3x", "--help"), ("-c", "import typer, pydantic"))
    rounds = [[seconds_of(*command) for command in commands] for _ in range(5)]
    shown, both_alone = (min(column) for column in zip(*rounds, strict=True))
    assert shown < 4 * both_alone


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["export", "--help"], ["inspect", "--help"]])
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_inspect_and_bad_input_import_no_torch(tmp_path: Path) -> None:
    for arguments in (["inspect", "nowhere"], ["export", "-t", "onx"], ["export", "--batch", "8:1"], ["targets"]):
        done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, cwd=tmp_path)
        code, _, imported = done.stdout.splitlines()[-1].partition(" ")
        assert code == ("0" if arguments == ["targets"] else "2") and "torch" not in imported


@pytest.mark.parametrize("command", ["export", "verify", "inspect", "targets"])
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0 and "Usage: sam3x" in result.stdout


def test_version() -> None:
    assert run("--version").stdout == f"sam3x {__version__}\n"
