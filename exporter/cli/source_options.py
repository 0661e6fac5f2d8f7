"""What ``--checkpoint``, ``--module`` and ``--demo`` may be together."""

from __future__ import annotations

from pathlib import Path

from sam3x.demo import WEIGHTS
from sam3x.errors import SpecError


def chosen_checkpoint(checkpoint: Path | None, module: str | None, *, demo: bool = False) -> Path | None:
    """The checkpoint that is named, by ``--demo`` too; None where ``module`` is the source, or there is none.

    Raises:
        SpecError: more than one is given.
    """
    given = [name for name, value in (("--checkpoint", checkpoint), ("--module", module), ("--demo", demo or None)) if value]
    if len(given) > 1:
        raise SpecError(f"{' and '.join(given)} each name the model", remedy="Give one of them.")
    return WEIGHTS if demo else checkpoint
