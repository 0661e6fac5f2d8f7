"""The command line before it does anything: help and bad input are quick and import nothing heavy."""

from __future__ import annotations

import subprocess
import sys
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


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["export", "--help"], ["inspect", "--help"], ["web", "--help"]]
)
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
