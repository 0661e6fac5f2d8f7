"""The command line in this process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from sam3x.cli import app as cli


def run(*arguments: str | Path) -> Result:
    """``sam3x`` with ``arguments``: its exit code, and what it wrote."""
    return CliRunner().invoke(cli.app, [str(item) for item in arguments], prog_name="sam3x")
