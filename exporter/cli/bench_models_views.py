"""The figures of ``sam3x bench-models`` as text: for the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sam3x.bench.models import ModelRow, ModelsReport
from sam3x.bench.views import machine_text, versions_text

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = (
    "model",
    "target",
    "files",
    "export",
    "export memory",
    "off",
    "mask IoU",
    "run",
    "eager",
    "of eager",
    "CPU of eager",
    "run memory",
    "above loaded",
    "activations",
)
MEANINGS = (
    ("files", "all files of the export."),
    ("export, export memory", "time and highest resident memory of its process, verification included."),
    ("off", "largest difference of an output of a component from eager, of the largest value of that output."),
    ("mask IoU", "the worst of the masks' with eager's, where the precision is below float32."),
    ("run, eager", "median of a picture and a prompt in, masks out, in turn, each in a process of its own."),
    ("of eager, CPU of eager", "medians of the rounds' own ratios; CPU time is what other work on the machine changes less."),
    (
        "run memory",
        "highest resident memory of the process that runs; **above loaded**: over what was resident before.",
    ),
    ("activations", "of TensorRT's engines, beside their weights: of the component that needs most, as the builder tells."),
)


def view(report: ModelsReport) -> list[RenderableType]:
    """A table of the rows, and a sentence for each that failed."""
    from sam3x.cli.views import plain_table

    shown = plain_table(f"{report.threads} threads", *COLUMNS)
    for row in report.rows:
        shown.add_row(row.model, row.kind, *(_cells(row) if row.failed is None else ("failed",)))
    return [shown, *(f"{row.model}, {row.kind}: {row.failed}" for row in report.rows if row.failed)]


def markdown(report: ModelsReport, command: str) -> str:
    """A page that names its commands."""
    return "\n".join([*_page(report, command), ""])


def _page(report: ModelsReport, command: str) -> Iterator[str]:
    yield from ("# Whole models", "")
    yield "Made by the command below; a figure here is changed by running it again. Times grow with what else the machine does;"
    yield from ("ratios are of rounds in turn, and ratios of CPU time move least.", "")
    yield from ("```", command, "```", "")
    yield f"- Machine: {machine_text(report.machine)}, {report.threads} threads"
    yield f"- Versions: {versions_text(report.machine)}"
    yield from ("", f"| {' | '.join(COLUMNS)} |", f"|---|---|{'---:|' * (len(COLUMNS) - 2)}")
    for row in report.rows:
        cells = _cells(row) if row.failed is None else (row.failed.replace("|", "\\|"), *[""] * (len(COLUMNS) - 3))
        yield f"| {row.model} | {row.kind} | {' | '.join(cells)} |"
    yield ""
    yield from (f"- **{name}**: {text}" for name, text in MEANINGS)
    yield ""
    for row in report.rows:
        yield from _details(row)


def _details(row: ModelRow) -> Iterator[str]:
    """The export, and the file of each component."""
    if row.failed is not None:
        return
    yield from (f"## {row.model}, {row.kind}", "", "```", f"{row.command} -o out/", "```", "")
    yield f"{row.origin}. Files in MB: {', '.join(f'`{name}` {size:,.1f}' for name, size in row.parts.items())}."
    if row.run is not None:
        found = row.run.contenders["pipeline"].detections
        gap = row.run.largest_score_gap or 0.0
        yield f"Of {found} detections the scores are within {gap:.1e} of eager's."
    if row.reason:
        yield f"Not verified: {row.reason}."
    yield ""


def _cells(row: ModelRow) -> tuple[str, ...]:
    run = row.run
    ours, eager = (None, None) if run is None else (run.contenders["pipeline"], run.contenders.get("eager"))
    return (
        _with("MB", row.files_mb),
        _with("s", row.export_seconds),
        _with("MB", row.export_mb),
        "" if row.off is None else f"{row.off:.1e}",
        "" if row.iou is None else f"{row.iou:.4f}",
        "" if ours is None else f"{ours.median:,.2f} s",
        "" if eager is None else f"{eager.median:,.2f} s",
        "" if run is None or run.ratio is None else f"{run.ratio:.2f}",
        "" if run is None or run.cpu_ratio is None else f"{run.cpu_ratio:.2f}",
        _with("MB", None if ours is None else ours.peak_mb),
        _with("MB", None if ours is None else ours.run_mb),
        _with("MB", row.activation_mb),
    )


def _with(unit: str, value: float | None) -> str:
    return "" if value is None else f"{value:,.0f} {unit}"
