"""The encoder that ``--checkpoint`` or ``--module`` names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sam3x.errors import SpecError

if TYPE_CHECKING:
    from sam3x.cli.views import Steps
    from sam3x.sources.encoder import Source


def exclusive(checkpoint: Path | None, module: str | None) -> None:
    """At most one of them.

    Raises:
        SpecError: both are given.
    """
    if checkpoint is not None and module is not None:
        raise SpecError("--checkpoint and --module both name the encoder", remedy="Give one of them.")


def named_source(checkpoint: Path | None, module: str | None, steps: Steps, weights_key: str | None = None) -> Source | None:
    """The source, loaded; None is the seeded default, which the API builds.

    Raises:
        SpecError: ``weights_key`` without a checkpoint.
        SourceError: it cannot be read as a fusion encoder.
    """
    if weights_key is not None and checkpoint is None:
        raise SpecError("--weights-key chooses among the weights of one file, which --checkpoint FILE names")
    steps.begin("source")
    if checkpoint is None and module is None:
        return None
    from sam3x.sources import encoder as sources

    if module is not None:
        return sources.factory_source(module)
    return sources.checkpoint_source(str(checkpoint), weights_key)
