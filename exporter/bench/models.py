"""``sam3x bench-models``: whole models on targets in precisions, each exported and run in processes of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sam3x.bench.pipeline import PipelineReport, bench_pipeline
from sam3x.bench.report import Machine
from sam3x.bench.run import machine_of
from sam3x.errors import Sam3xError, SpecError, Step
from sam3x.pipeline.request import resolve_pipeline
from sam3x.runtime.manifest import PipelineManifest, load_manifest

_RANDOM = "sam3x.pipeline.random_models:"
MODELS: Mapping[str, tuple[str, ...]] = {
    "sam3": ("--module", f"{_RANDOM}sam3"),
    "efficient-sam3": ("--module", f"{_RANDOM}efficient_sam3"),
    "small": ("--module", f"{_RANDOM}small_sam3"),
    "demo": ("--demo",),
}
"""Models that need no checkpoint: name → the options of ``sam3x export --pipeline``. All but ``demo`` have random weights."""

_FORM = "NAME[:PRECISION[:SM]], as in onnx, pte:fp16 or trt:fp16:sm89"


@dataclass(frozen=True, slots=True)
class Kind:
    """A target in a precision, for a GPU where it is one of TensorRT's."""

    target: str
    precision: str = "fp32"
    capability: str | None = None

    @classmethod
    def of(cls, text: str) -> Kind:
        """``trt:fp16:sm89`` → its three parts.

        Raises:
            SpecError: more or empty parts, a precision or GPU that the target has not. UnknownTargetError: no such target.
        """
        parts = text.split(":")
        if not all(parts) or len(parts) > 3:
            raise SpecError(f"expected {_FORM}, got {text!r}", subject="--target", step=Step.BENCH)
        names = ("precision", "compute_capability")
        given = {name: value for name, value in zip(names, parts[1:], strict=False) if (name, value) != ("precision", "fp32")}
        resolve_pipeline(parts[0], given)
        return cls(*parts)

    @property
    def options(self) -> list[str]:
        """Of ``sam3x export``."""
        precision = [] if self.precision == "fp32" else ["--precision", self.precision]
        return ["--target", self.target, *precision, *(["--compute-capability", self.capability] if self.capability else [])]

    @property
    def name(self) -> str:
        """As it was written."""
        return ":".join(filter(None, (self.target, self.precision, self.capability)))


class ModelRow(BaseModel):
    """One model on one target. Megabytes are 10⁶ bytes, memory is the highest resident of a process of its own.

    Attributes:
        command: the export. origin: of the weights.
        files_mb: of all files; parts: component → megabytes of its file and data.
        export_seconds, export_mb: of the whole export, verification included.
        verified: whether its files were run against eager; ``reason`` says why not.
        off: largest difference of an output from eager, of the largest value of that output. iou: of masks with eager's, the
            worst, where the precision is below float32.
        activation_mb: what an engine needs beside its weights, of the component that needs most.
        run: beside eager in turn; None where the files do not run here.
        failed: in place of everything else: what the export or the run said.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    kind: str
    command: str
    origin: str = ""
    files_mb: float | None = None
    parts: dict[str, float] = {}
    export_seconds: float | None = None
    export_mb: float | None = None
    verified: bool = False
    reason: str | None = None
    off: float | None = None
    iou: float | None = None
    activation_mb: float | None = None
    run: PipelineReport | None = None
    failed: str | None = None


class ModelsReport(BaseModel):
    """Every row that was asked for. ``machine`` is this one, now; a row that was measured before has its own in ``run``."""

    model_config = ConfigDict(frozen=True)

    rows: tuple[ModelRow, ...]
    machine: Machine
    threads: int
    repeat: int


def bench_models(
    models: Mapping[str, Sequence[str]],
    kinds: Sequence[Kind],
    *,
    options: Sequence[str] = (),
    keep: Path | None = None,
    threshold: float | None = None,
    threads: int = 2,
    repeat: int = 3,
    timeout: float = 3600.0,
    tell: Callable[[str], None] = lambda _: None,
) -> ModelsReport:
    """Export every model to every kind, run what runs here beside eager, and tell what each took. One that fails is a row.

    Args:
        models: name → the options of ``sam3x export --pipeline`` that name its source. options: further ones, for all.
        keep: folder for the exports and figures; what is there is not made again, be it the export alone. None: none is kept.
        threshold: detections of the runs score above it; None: the model's own.
        timeout: seconds that an export, or one step of a run, may take.
    """
    rows = []
    with _room(keep) as room:
        for model, source in models.items():
            for kind in kinds:
                folder = room / f"{model}-{kind.name.replace(':', '-')}"
                figures = folder.with_name(f"{folder.name}.json")
                words = ["--pipeline", *source, *kind.options, *options]
                row = _known(figures, words)
                if row is None:
                    tell(f"{model} {kind.name}: export")
                    row = _exported(model, kind, words, folder, timeout)
                    _keep(row, figures)
                if row.failed is None and row.verified and row.run is None:
                    tell(f"{model} {kind.name}: run")
                    row = _run(row, folder, source, threshold, threads, repeat, timeout)
                    _keep(row, figures)
                rows.append(row)
    return ModelsReport(rows=tuple(rows), machine=machine_of(), threads=threads, repeat=repeat)


@contextlib.contextmanager
def _room(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def _known(figures: Path, words: Sequence[str]) -> ModelRow | None:
    """Read what was measured of the same export before; None where nothing was."""
    try:
        row = ModelRow.model_validate_json(figures.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return row if row.command == _command(words) else None


def _keep(row: ModelRow, figures: Path) -> None:
    """Write what was measured; of a run that failed the export stays."""
    if row.failed is None:
        figures.write_text(row.model_dump_json(indent=1), encoding="utf-8")


def _command(words: Sequence[str]) -> str:
    return " ".join(["sam3x", "export", *words])


def _exported(model: str, kind: Kind, words: Sequence[str], folder: Path, timeout: float) -> ModelRow:
    """Export in a process of its own, whose manifest has its time and its peak."""
    row = ModelRow(model=model, kind=kind.name, command=_command(words))
    run = [sys.executable, "-c", "from sam3x.cli.app import main; main()", "export", *words, "-o", str(folder), "--quiet"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # a folder called onnx beside it would be taken for the package
    try:
        done = subprocess.run(run, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        return row.model_copy(update={"failed": f"no export in {timeout:g} s"})
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return row.model_copy(update={"failed": " ".join(said[-3:])[-300:] or f"exit code {done.returncode}"})
    manifest = load_manifest(folder, check=False)
    return row.model_copy(update=_figures(manifest, folder))


def _figures(manifest: PipelineManifest, folder: Path) -> dict[str, Any]:
    """What the manifest tells of an export."""
    sizes = {name: (folder / name).stat().st_size / 1e6 for name in manifest.files}
    activations = [item.metadata["activation_bytes"] for item in manifest.components if "activation_bytes" in item.metadata]
    offs = [record.max_rel for item in manifest.components for record in item.verification]
    return {
        "origin": manifest.origin,
        "files_mb": sum(sizes.values()),
        "parts": {
            item.name: sum(size for name, size in sizes.items() if name in (item.file, f"{item.file}.data"))
            for item in manifest.components
        },
        "export_seconds": manifest.metrics["total_seconds"],
        "export_mb": manifest.metrics["peak_rss_mb"] * 2**20 / 1e6,
        "verified": manifest.verified,
        "reason": manifest.verified_reason,
        "off": max(offs, default=None),
        "iou": None if manifest.quality is None else manifest.quality.min_iou,
        "activation_mb": max(activations) / 1e6 if activations else None,
    }


def _run(
    row: ModelRow,
    folder: Path,
    source: Sequence[str],
    threshold: float | None,
    threads: int,
    repeat: int,
    timeout: float,
) -> ModelRow:
    """A picture and a prompt through the files and through eager, in turn, each in a process of its own."""
    named = dict(zip(source[::2], source[1::2], strict=False))
    if "--demo" in source:
        from sam3x.demo import WEIGHTS

        named = {"--checkpoint": str(WEIGHTS)}
    checkpoint = named.get("--checkpoint")
    try:
        report = bench_pipeline(
            folder,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            module=named.get("--module"),
            threshold=threshold,
            threads=threads,
            repeat=repeat,
            timeout=timeout,
        )
    except Sam3xError as error:
        return row.model_copy(update={"failed": f"it does not run: {error.fact}"[:300]})
    return row.model_copy(update={"run": report})
