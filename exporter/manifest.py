"""``manifest.json``: what an artifact is, where it came from, and the proof that it is right."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class TensorSpec(_Record):
    """A graph input or output: numpy dtype name; a dimension is an int or a name (``batch``)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class MissedRecord(_Record):
    """Where a pass nearly matched, and why it refused."""

    node: str
    reason: str


class PassRecordModel(_Record):
    """One pass of the export, as ``sam3x.passes.pipeline.PassRecord``."""

    name: str
    modified: bool
    rewrites: int
    nodes_before: int
    nodes_after: int
    seconds: float
    missed: tuple[MissedRecord, ...] = ()
    max_change: float | None = None


class VerificationRecord(_Record):
    """One branch at one size, one output.

    ``max_abs`` and ``max_rel`` compare the artifact with eager float32. ``from_float64`` and ``eager_from_float64`` are both
    runs' distances from eager float64. Passed when ``max_abs`` ≤ ``allowed``, or the artifact is within 4 times eager's own.
    ``undefined`` elements are NaN in eager itself, which only an all-padded prompt may cause; they are not compared.
    """

    branch: str
    case: str
    output: str
    max_abs: float
    max_rel: float
    from_float64: float
    eager_from_float64: float
    allowed: float
    passed: bool
    undefined: int = 0


class ExportManifest(_Record):
    """Everything ``sam3x inspect`` shows.

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
    target_options: dict[str, Any] = {}
    ranges: dict[str, tuple[int, int]]
    origin: str
    weights_sha256: str
    versions: dict[str, str]
    passes: tuple[PassRecordModel, ...]
    verification: tuple[VerificationRecord, ...] = ()
    verified: bool = False
    verified_reason: str | None = None
    facts: dict[str, Any] = {}
    files: dict[str, str]
    figures: dict[str, float] = {}
    notes: tuple[str, ...] = ()
