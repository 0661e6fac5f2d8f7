"""What the command line shows: steps with times on stderr, tables on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from sam3x.artifact.manifest import Manifest, PassRecordModel, TensorSpec, VerificationRecord
    from sam3x.targets.base import TargetStatus

METRICS = {
    "capture_seconds": ("capture", "s"),
    "passes_seconds": ("passes", "s"),
    "lower_seconds": ("lower", "s"),
    "verify_seconds": ("verify", "s"),
    "total_seconds": ("export, in all", "s"),
    "peak_rss_mb": ("peak memory", "MB"),
}
"""``manifest.metrics`` in the order of an export; others follow under their own names."""


METADATA = {
    "form": "form of the network",
    "delegated": "operators delegated",
    "portable": "operators on portable kernels",
    "delegated_flops": "FLOPs delegated",
    "gflops": "GFLOPs of the largest run",
    "planned_bytes": "memory planned outside delegates",
    "workspace_bytes": "memory inside the largest delegate",
    "bundled_cases": "test sets of the .bpte",
    "int8_products": "products in int8",
    "narrow_tensors": "weights stored below float32",
    "narrow_bytes": "what they take",
    "float32_bytes": "everything else in the file's tensors",
}
"""``manifest.metadata`` in words; others under their own names."""


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    # markup off: shapes and names hold brackets. A pipe gets a fixed width that fits the tables.
    return Console(file=stream, markup=False, highlight=False, emoji=False, width=None if stream.isatty() else 120)


def show(parts: Iterable[RenderableType]) -> None:
    """Print on stdout."""
    console = _console()
    for part in parts:
        console.print(part)


class Steps:
    """Each step's name while it runs and its time once it is done, on stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._console = _console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        live = not quiet and self._console.is_terminal
        self._live = Progress(
            *columns, console=self._console, transient=True, disable=not live, redirect_stdout=False, redirect_stderr=False
        )
        self._current: tuple[str, float] | None = None

    def __enter__(self) -> Steps:
        self._live.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._finish("failed" if kind else "done")
        self._live.stop()

    def begin(self, name: str) -> None:
        """Start a step, which ends the one before it; a step told twice goes on."""
        if self._current and self._current[0] == name:
            return
        self.end()
        self._current = (name, time.perf_counter())
        self._live.add_task(name, total=None)

    def at(self, words: str) -> None:
        """How far the current step is, where it is shown while it runs."""
        for task in self._live.task_ids:
            self._live.update(task, description=f"{self._current[0]}, {words}" if self._current else words)

    def end(self) -> None:
        """The current step is done."""
        self._finish("done")

    def say(self, message: str, *, warn: bool = False) -> None:
        """One line between the steps."""
        if not self.quiet:
            self._console.print(Text(message, style="bold yellow" if warn else ""), soft_wrap=True)

    def _finish(self, word: str) -> None:
        if self._current is None:
            return
        name, started = self._current
        self._current = None
        for task in self._live.task_ids:
            self._live.remove_task(task)
        line = Text(f"{name:<16} {time.perf_counter() - started:7.1f} s")
        self.say_text(line if word == "done" else line.append("  failed", style="red"))

    def say_text(self, line: Text) -> None:
        """A line with its own style."""
        if not self.quiet:
            self._console.print(line)


def export_summary(manifest: Manifest, folder: Path, *, verbose: bool) -> list[RenderableType]:
    """After an export: what was written, from which weights, how far from eager, what it cost."""
    rows = [("wrote", ", ".join([*(str(folder / name) for name in manifest.files), str(folder / "manifest.json")]))]
    rows.append(("weights", manifest.origin))
    if "form" in manifest.metadata:
        rows.append((METADATA["form"], manifest.metadata["form"]))
    rows.append(("verification", _verdict(manifest)))
    metrics = [
        f"{METRICS[key][0]} {_figure(key, manifest.metrics[key])}"
        for key in ("total_seconds", "peak_rss_mb")
        if key in manifest.metrics
    ]
    rows.append(("cost", ", ".join(metrics)))
    rows += [("note", note) for note in manifest.notes]
    more = [passes_table(manifest.passes), *_refusals(manifest.passes)] if verbose else []
    return [*more, pairs(rows)]


def manifest_view(manifest: Manifest, folder: Path, *, verbose: bool = False) -> list[RenderableType]:
    """All of ``sam3x inspect``."""
    m = manifest
    identity = [
        ("folder", str(folder)),
        ("target", m.target if m.opset is None else f"{m.target}, opset {m.opset}"),
        ("interface", m.interface),
        ("weights", m.origin),
        ("weights sha256", m.weights_sha256),
        ("flags", ", ".join(f"{name} {m.spec[name]}" for name in ("dac", "pre_norm", "dac_dim") if name in m.spec)),
        ("versions", ", ".join(f"{name} {version}" for name, version in m.versions.items())),
        ("verification", _verdict(m)),
    ]
    parts: list[RenderableType] = [pairs(identity), tensors_table("Inputs", m.inputs), tensors_table("Outputs", m.outputs)]
    ranges = plain_table("Ranges", "dimension", "min", "max")
    for name, (low, high) in m.ranges.items():
        ranges.add_row(name, str(low), str(high))
    parts += [ranges, passes_table(m.passes), *_refusals(m.passes)]
    if m.verification:
        parts.append(verification_table(m.verification, verbose=verbose))
    files = plain_table("Files", "name", "sha256")
    for name, digest in m.files.items():
        files.add_row(name, digest)
    metrics = plain_table("Figures of the export", "what", ">value")
    for key in [*(key for key in METRICS if key in m.metrics), *(key for key in m.metrics if key not in METRICS)]:
        metrics.add_row(METRICS.get(key, (key, ""))[0], _figure(key, m.metrics[key]))
    parts += [files, metrics]
    if m.metadata:
        metadata = plain_table("Metadata of the file", "what", "value")
        for key, value in m.metadata.items():
            metadata.add_row(METADATA.get(key, key.replace("_", " ")), _fact(key, value))
        parts.append(metadata)
    if m.notes:
        parts.append(Group(Text("Notes", style="bold"), *(Text(f"- {note}") for note in m.notes)))
    return parts


def tensors_table(title: str, tensors: Sequence[TensorSpec]) -> Table:
    """Names in graph order, dtypes, shapes."""
    table = plain_table(title, "name", "dtype", "shape")
    for item in tensors:
        table.add_row(
            item.name, item.dtype, "(" + ", ".join(str(size) for size in item.shape) + ")" if item.shape else "scalar"
        )
    return table


def passes_table(passes: Sequence[PassRecordModel]) -> Table:
    """One row a pass."""
    table = plain_table("Passes", "name", ">rewrites", ">refused", ">nodes before", ">after", ">seconds", ">max change")
    for item in passes:
        change = "" if item.max_change is None else f"{item.max_change:.1e}"
        counts = (item.rewrites, len(item.match_failures), item.nodes_before, item.nodes_after)
        table.add_row(item.name, *map(str, counts), f"{item.seconds:.2f}", change)
    return table


def _refusals(passes: Sequence[PassRecordModel]) -> list[RenderableType]:
    rows = [(item.name, failure.node, failure.reason) for item in passes for failure in item.match_failures]
    if not rows:
        return []
    table = plain_table("Refused by passes", "pass", "node", "reason")
    for row in rows:
        table.add_row(*row)
    return [table]


def verification_table(records: Sequence[VerificationRecord], *, verbose: bool = False) -> Table:
    """One row a branch and output with its worst figures; verbose: one a comparison."""
    names = ["max_abs", "max_rel", "from_float64", "eager_from_float64"]
    reduced = [">rms", ">eager, rounded"] if any(record.rms_rel is not None for record in records) else []
    names += ["rms_rel", "eager_rms_rel"] if reduced else []
    weights = any(record.from_unrounded is not None for record in records)
    names += ["from_unrounded"] if weights else []
    table = plain_table(
        "Branches: largest distances",
        "branch",
        "output",
        "case" if verbose else ">cases",
        ">abs",
        ">rel",
        ">float64",
        ">eager's own",
        *reduced,
        *([">abs, unrounded"] if weights else []),
        "passed",
    )
    groups: dict[tuple[str, ...], list[VerificationRecord]] = {}
    for record in records:
        groups.setdefault((record.branch, record.output, *([record.case] if verbose else [])), []).append(record)
    for key, group in groups.items():
        worst = [[value for item in group if (value := getattr(item, name)) is not None] for name in names]
        passed = all(item.passed for item in group)
        case = key[2] if verbose else str(len(group))
        table.add_row(
            *key[:2],
            case,
            *(f"{max(values):.1e}" if values else "" for values in worst),
            Text("yes" if passed else "NO", style="" if passed else "bold red"),
        )
    known = "abs, rel, rms" if reduced and not weights else "abs, rel"
    table.caption = (
        f"{known}: from eager float32; float64, eager's own: the artifact's and eager float32's distance from float64"
    )
    if weights:
        table.caption += ", all with the same rounded weights; rms, rounded, unrounded: from eager float32 as it was"
    return table


def targets_table(statuses: Sequence[TargetStatus]) -> Table:
    """Each back end, whether it works here, and the command that makes it so."""
    table = plain_table("", "target", "works here", "detail", "install")
    for item in statuses:
        table.add_row(item.name, "yes" if item.available else "no", item.detail, item.install)
    return table


def _verdict(manifest: Manifest) -> str:
    if not manifest.verification:
        return f"NOT verified: {manifest.verified_reason}"
    worst = max(manifest.verification, key=lambda record: record.max_abs)
    branches, comparisons = len({record.branch for record in manifest.verification}), len(manifest.verification)
    weights = [record.from_unrounded for record in manifest.verification if record.from_unrounded is not None]
    which = " with the same weights" if weights else ""
    text = f"{branches} branches, {comparisons} comparisons, at most {worst.max_abs:.1e} from eager{which} ({worst.branch})"
    text += f"; from eager before rounding {max(weights):.1e}" if weights else ""
    coarse = [record for record in manifest.verification if record.rms_rel is not None]
    for peaked, what in ((False, "root mean square"), (True, "with peaked attention")):
        errors = [record.rms_rel or 0.0 for record in coarse if ("peaked" in record.case) is peaked]
        text += f", {max(errors):.2%} {what}" if errors else ""
    return text


def _fact(key: str, value: Any) -> str:
    if isinstance(value, dict):
        counts = sorted(value.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{name} {count}" for name, count in counts) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if key == "delegated_flops":
        return f"{100 * value:.2f} %"
    return f"{value / 1e6:,.1f} MB" if key.endswith("_bytes") else str(value)


def _figure(key: str, value: float) -> str:
    unit = METRICS.get(key, ("", ""))[1]
    return f"{value:,.0f} MB" if unit == "MB" else f"{value:.1f} s" if unit == "s" else f"{value:g}"


def plain_table(title: str, *columns: str) -> Table:
    """A plain table; a column that begins with ``>`` is right-aligned."""
    table = Table(
        title=title or None, title_justify="left", title_style="bold", caption_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for name in columns:
        table.add_column(
            name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold", header_style="dim"
        )
    return table


def pairs(rows: Sequence[tuple[str, str]]) -> Table:
    """Names and values, a line each."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
