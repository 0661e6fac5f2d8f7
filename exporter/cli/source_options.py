"""What ``--checkpoint`` and ``--module`` may be together."""

from __future__ import annotations

from pathlib import Path

from sam3x.errors import SpecError


def exclusive(checkpoint: Path | None, module: str | None) -> None:
    """At most one of them.

    Raises:
        SpecError: both are given.
    """
    if checkpoint is not None and module is not None:
        raise SpecError("--checkpoint and --module both name the encoder", remedy="Give one of them.")
