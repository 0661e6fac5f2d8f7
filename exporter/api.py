"""``sam3x.export`` and ``sam3x.api.verify``: source → capture → passes → target → verified artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sam3x.artifact.artifact import Artifact, load
from sam3x.artifact.manifest import VerificationRecord
from sam3x.pipeline.export import export_model
from sam3x.pipeline.job import Progress
from sam3x.pipeline.request import resolve
from sam3x.pipeline.reverify import verify_model
from sam3x.sources.encoder import Source, encoder_factory
from sam3x.warning_filters import warnings_not_raised


@warnings_not_raised()
def export(
    encoder: nn.Module | Sequence[nn.Module] | Source | None = None,
    *,
    target: str = "onnx",
    output: str | Path,
    progress: Progress | None = None,
    disable_pass: Sequence[str] = (),
    dump_graphs: str | Path | None = None,
    **options: Any,
) -> Artifact:
    """Export a fusion encoder and verify what was written.

    Args:
        encoder: a ``TransformerEncoderFusion``, ``TransformerEncoder``, ``TransformerEncoderLayer``, list of layers, a
            ``Source``, or None for SAM3's own hyper-parameters with seeded random weights. Used as it is, never changed.
        target: see ``sam3x targets``.
        output: folder; an earlier export in it is replaced as a whole once everything is verified (``sam3x.artifact.publish``).
        progress: told the name of each step as it begins.
        disable_pass: passes to leave out. dump_graphs: folder for the graph after each pass.
        options: the fields of ``ExportSpec``, and of the target's own options (``targets/<name>/target.py``).

    Returns:
        The artifact, loaded from ``output``.

    Raises:
        Sam3xError: typed by step; nothing is left in ``output`` that was not there before.
    """
    request = resolve(target, options, disable_pass=disable_pass, dump_graphs=dump_graphs)
    export_model(request, encoder_factory(encoder), output, progress=progress)
    return load(output)


@warnings_not_raised()
def verify(folder: str | Path, source: nn.Module | Source | None = None, *, full: bool = False) -> list[VerificationRecord]:
    """Run an artifact against the eager encoder again; one that was never verified is from then on.

    Args:
        source: what it was exported from; None rebuilds the seeded default.
        full: also at 72×72 tokens.

    Raises:
        ArtifactError: the source's weights are not those of the artifact.
        VerificationError: an output is further off than allowed.
    """
    return verify_model(folder, encoder_factory(source), full=full)
