"""``manifest.json``: what an artifact is, where it came from, and the proof that it is right."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from sam3x.errors import ArtifactError
from sam3x.verify.record import Record, TensorSpec, VerificationRecord

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
_LARGEST = 1 << 26  # bytes; a manifest is some hundred thousand at most


class MissedRecord(Record):
    """Where a pass nearly matched, and why it refused."""

    node: str
    reason: str


class PassRecordModel(Record):
    """One pass of the export, as ``sam3x.passes.pipeline.PassRecord``."""

    name: str
    modified: bool
    rewrites: int
    nodes_before: int
    nodes_after: int
    seconds: float
    missed: tuple[MissedRecord, ...] = ()
    max_change: float | None = None

    @classmethod
    def of(cls, record: Any) -> PassRecordModel:
        """From a ``sam3x.passes.pipeline.PassRecord``."""
        missed = tuple(MissedRecord(node=item.node, reason=item.reason) for item in record.missed)
        names = ("name", "modified", "rewrites", "nodes_before", "nodes_after", "max_change")
        return cls(**{name: getattr(record, name) for name in names}, seconds=round(record.seconds, 4), missed=missed)


class ExportManifest(Record):
    """Everything ``sam3x inspect`` shows.

    ``files`` are relative names, nested ones too (``1/model.plan``), each with its sha256; ``manifest_sha256`` is that of the
    manifest itself (see ``sealed``), so that neither can be changed unnoticed. It is no signature.
    ``ranges`` are inclusive sizes of the named dimensions; ``facts`` are what the target tells of its file (delegates, …).
    """

    schema_version: int = SCHEMA_VERSION
    target: str
    opset: int | None = None
    interface: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    spec: dict[str, Any]
    target_options: dict[str, Any] = Field(default_factory=dict)
    ranges: dict[str, tuple[int, int]]
    origin: str
    weights_sha256: str
    versions: dict[str, str]
    passes: tuple[PassRecordModel, ...]
    verification: tuple[VerificationRecord, ...] = ()
    verified: bool = False
    verified_reason: str | None = None
    facts: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, str]
    figures: dict[str, float] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    manifest_sha256: str = ""


def sealed(manifest: BaseModel) -> str:
    """The text of ``manifest.json``, with a hash over everything else in it."""
    values = json.loads(manifest.model_dump_json())
    return json.dumps({**values, "manifest_sha256": _seal_of(values)}, indent=2) + "\n"


def _seal_of(values: dict[str, Any]) -> str:
    rest = {name: value for name, value in values.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_values(folder: Path) -> dict[str, Any]:
    """What stands in the manifest in ``folder``, as it was written, whatever it is a manifest of.

    Raises:
        ArtifactError: none, of another schema, no manifest, or changed after the export.
    """
    path = folder / MANIFEST
    again = f"Export again: sam3x export -o {folder}"
    try:
        if path.exists() and not path.is_file():
            raise ArtifactError(f"{path} is no regular file", remedy=again)
        if path.stat().st_size > _LARGEST:
            raise ArtifactError(f"{path} is too large for a manifest", remedy=again)
        values = json.loads(path.read_bytes())
        seal = _seal_of(values) if isinstance(values, dict) else None
    except OSError as error:
        remedy = "Check its permissions." if isinstance(error, PermissionError) else f"Export first: sam3x export -o {folder}"
        raise ArtifactError(f"{path} cannot be read ({error.strerror})", remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is no sam3x manifest ({error})", remedy=again) from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise ArtifactError(f"{path} is no sam3x manifest (it tells no schema_version)", remedy=again)
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{path} has manifest schema {version}, this sam3x reads {SCHEMA_VERSION}", remedy=again)
    if values.get("manifest_sha256") != seal:
        raise ArtifactError(f"{path} was changed after the export (its own sha256 differs)", remedy=again)
    return values


def read_manifest(folder: Path) -> ExportManifest:
    """The manifest of a fusion encoder in ``folder``. The files it names are not looked at.

    Raises:
        ArtifactError: as ``read_values``, or the folder holds something else.
    """
    values = read_values(folder)
    if values.get("kind") == "pipeline":
        raise ArtifactError(f"{folder} holds a whole image model", remedy="Run it with sam3x run, or sam3x.runtime.Segmenter.")
    return validated(ExportManifest, values, folder)


Manifest = TypeVar("Manifest", bound=BaseModel)


def validated(model: type[Manifest], values: dict[str, Any], folder: Path) -> Manifest:
    """``values`` as a manifest.

    Raises:
        ArtifactError: a field is missing or wrong.
    """
    try:
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        fact = str(error).splitlines()[0]
        again = f"Export again: sam3x export -o {folder}"
        raise ArtifactError(f"{folder / MANIFEST} is no sam3x manifest ({fact})", remedy=again) from error
