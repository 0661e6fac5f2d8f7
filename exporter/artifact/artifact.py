"""An exported folder: load it, check it, run it. No torch needed for an ONNX artifact."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3x.artifact.files import is_inside, link_in, sha256_of
from sam3x.artifact.inputs import checked_inputs
from sam3x.artifact.journal import recover
from sam3x.artifact.manifest import MANIFEST, Manifest, PipelineManifest, read_manifest
from sam3x.errors import ArtifactError, Sam3xError, Step
from sam3x.targets.registry import get_target
from sam3x.warning_filters import warnings_not_raised

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sam3x.targets.base import Runner


@dataclass(frozen=True)
class Artifact:
    """A verified export. ``folder`` holds the graph file and ``manifest.json``."""

    folder: Path
    manifest: Manifest

    @property
    def path(self) -> Path:
        """The graph file."""
        return self.folder / self.manifest.encoder.file

    @functools.cached_property
    def _runner(self) -> Runner:
        try:
            return get_target(self.manifest.target).load_runner(self.path)
        except Sam3xError:
            raise
        except Exception as error:  # every runtime has exceptions of its own
            raise ArtifactError(f"{self.path} cannot be opened: {_first_line(error)}", remedy="Export again.") from error

    @warnings_not_raised()
    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            inputs: every name of ``manifest.input_names``: numpy arrays, torch tensors or Python bools for the flags.

        Returns:
            Output name → array.

        Raises:
            ArtifactError: a name, dtype, rank or size is not what the manifest says, dac meets an odd dimension, or the file
                cannot be opened or run.
        """
        arrays = checked_inputs(self.manifest, inputs)
        try:
            return self._runner.run(arrays)
        except Sam3xError:
            raise
        except Exception as error:  # every runtime has exceptions of its own
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            fact = f"{self.manifest.target} failed on {shapes}: {_first_line(error)}"
            raise ArtifactError(fact, remedy=f"Check the artifact: sam3x verify {self.folder}", step=Step.RUN) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(".")


@warnings_not_raised()
def load(folder: str | Path) -> Artifact:
    """Open an exported folder, checking the manifest and every file's sha256.

    Finishes an export that was killed after it was complete (``sam3x.artifact.journal``).

    Raises:
        ArtifactError: no manifest, one of another schema, a missing or edited file, a name or a link that leads elsewhere.
    """
    manifest = load_any(folder)
    if isinstance(manifest, PipelineManifest):
        remedy = "Run it with sam3x run, or sam3x.runtime.Segmenter."
        raise ArtifactError(f"{folder} holds a whole image model", remedy=remedy)
    return Artifact(folder=Path(folder), manifest=manifest)


def load_any(folder: str | Path, command: str = "sam3x export", *, hashes: bool = True) -> Manifest:
    """The manifest of whatever was exported into ``folder``, once every file is as it was written.

    Args:
        command: see ``read_manifest``. hashes: False leaves the contents of the files unread.

    Raises:
        ArtifactError: as ``load``.
    """
    root = Path(folder)
    while True:
        recover(root)
        before = _identity(root / MANIFEST)
        manifest = read_manifest(root, command)
        try:
            _check_named(root, manifest)
            check_files(root, manifest.files, hashes=hashes)
        except ArtifactError:
            recover(root)
            if _identity(root / MANIFEST) == before:
                raise  # else another export has just replaced this one
        else:
            return manifest


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file stands there; every export brings a new one."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def _check_named(root: Path, manifest: Manifest) -> None:
    """Every file that is opened has a sha256."""
    tokenizer = manifest.tokenizer if isinstance(manifest, PipelineManifest) else None
    named = {item.file for item in manifest.components} | ({tokenizer} if tokenizer else set())
    if not manifest.components or not named <= set(manifest.files):
        strange = ", ".join(sorted(named - set(manifest.files))) or "any component"
        raise ArtifactError(f"the manifest in {root} does not name {strange}", remedy="Export again.")


def check_files(root: Path, files: Mapping[str, str], *, hashes: bool = True) -> None:
    """Every file a manifest names is there, inside the folder, and as it was written.

    Args:
        files: relative name → sha256. hashes: False leaves the contents unread.

    Raises:
        ArtifactError: a name or a link that leads elsewhere, a missing or edited file.
    """
    for name, expected in files.items():
        path = root / name
        if not is_inside(name):
            raise ArtifactError(f"the manifest names '{name}', which is outside {root}", remedy="Export again.")
        if (link := link_in(root, name)) is not None:
            raise ArtifactError(f"{link} is a symbolic link, which may lead outside {root}", remedy="Export again.")
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", remedy="Export again.")
        if not hashes:
            continue
        try:
            found = sha256_of(path)
        except OSError as error:
            remedy = "Check its permissions." if isinstance(error, PermissionError) else ""
            raise ArtifactError(f"{path} cannot be read ({error.strerror})", remedy=remedy) from error
        if found != expected:
            raise ArtifactError(f"{path} was changed after the export (sha256 differs)", remedy="Export again.")
