"""``manifest.json``: what an artifact is, where it came from, and the proof that it is right."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AliasChoices, BaseModel, Field, ValidationError

from sam3x.errors import ArtifactError
from sam3x.verify.record import Record, TensorSpec, VerificationRecord

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
_LARGEST = 1 << 26  # bytes; a manifest is some hundred thousand at most


class MatchFailureRecord(Record):
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
    match_failures: tuple[MatchFailureRecord, ...] = Field(
        default=(), validation_alias=AliasChoices("match_failures", "missed")
    )
    max_change: float | None = None

    @classmethod
    def of(cls, record: Any) -> PassRecordModel:
        """From a ``sam3x.passes.pipeline.PassRecord``."""
        failures = tuple(MatchFailureRecord(node=item.node, reason=item.reason) for item in record.match_failures)
        names = ("name", "modified", "rewrites", "nodes_before", "nodes_after", "max_change")
        return cls(**{name: getattr(record, name) for name in names}, seconds=round(record.seconds, 4), match_failures=failures)


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


def read_values(folder: Path, command: str = "sam3x export") -> dict[str, Any]:
    """What stands in the manifest in ``folder``, as it was written, whatever it is a manifest of.

    Args:
        command: what writes such a manifest, for the advice of an error; a pipeline's says so itself.

    Raises:
        ArtifactError: none, of another schema, no manifest, or changed after the export.
    """
    path = folder / MANIFEST
    try:
        if path.exists() and not path.is_file():
            raise ArtifactError(f"{path} is no regular file", remedy=_again(folder, command))
        if path.stat().st_size > _LARGEST:
            raise ArtifactError(f"{path} is too large for a manifest", remedy=_again(folder, command))
        values = json.loads(path.read_bytes())
        seal = _seal_of(values) if isinstance(values, dict) else None
    except OSError as error:
        remedy = "Check its permissions." if isinstance(error, PermissionError) else f"Export first: {command} -o {folder}"
        raise ArtifactError(f"{path} cannot be read ({error.strerror})", remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise _no_manifest(path, str(error)) from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise _no_manifest(path, "it tells no schema_version")
    remedy = _again(folder, "sam3x export --pipeline" if values.get("kind") == "pipeline" else command)
    if version != SCHEMA_VERSION:
        fact = f"{path} has manifest schema {version}, this sam3x reads {SCHEMA_VERSION}"
        raise ArtifactError(fact, remedy=remedy)
    if values.get("manifest_sha256") != seal:
        fact = f"{path} was changed after the export (its own sha256 differs)"
        raise ArtifactError(fact, remedy=remedy)
    return values


def _again(folder: Path, command: str) -> str:
    return f"Export again: {command} -o {folder}"


def _no_manifest(path: Path, fact: str) -> ArtifactError:
    """An export leaves such a file alone, so exporting again is no way out."""
    remedy = "Move it away, then export again."
    return ArtifactError(f"{path} is no sam3x manifest ({fact})", remedy=remedy)


def names_written(folder: Path) -> set[str]:
    """What an export wrote into ``folder``, its manifest too, whatever was changed since; nothing where sam3x wrote none."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_bytes()) if path.stat().st_size <= _LARGEST else None
    except (OSError, ValueError, RecursionError):
        return set()
    if not isinstance(values, dict) or not isinstance(values.get("manifest_sha256"), str):
        return set()
    return {MANIFEST, *(values["files"] if isinstance(values.get("files"), dict) else ())}


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
        raise _no_manifest(folder / MANIFEST, str(error).splitlines()[0]) from error
