"""The manifest of a pipeline, read and checked."""

from __future__ import annotations

from pathlib import Path

from sam3x.artifact.artifact import load_any
from sam3x.artifact.manifest import SEGMENTER, ComponentSpec, PipelineManifest, PromptQuality, Quality
from sam3x.errors import ArtifactError

__all__ = ["SEGMENTER", "ComponentSpec", "PipelineManifest", "PromptQuality", "Quality", "load_manifest"]


def load_manifest(folder: str | Path, *, check: bool = True) -> PipelineManifest:
    """The manifest of an exported pipeline, every file compared with its sha256.

    Args:
        check: False skips the hashes, which takes seconds for gigabytes.

    Raises:
        ArtifactError: no pipeline, another schema, a missing or edited file, a name outside the folder.
    """
    manifest = load_any(folder, "sam3x export --pipeline", hashes=check)
    if not isinstance(manifest, PipelineManifest):
        remedy = f"Export one: sam3x export --pipeline -o {folder}"
        raise ArtifactError(f"{folder} holds no pipeline, but a single encoder", remedy=remedy)
    return manifest
