"""The figures of ``sam3x bench-pipeline`` as text: for the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sam3x.bench.views import machine_text, versions_text

if TYPE_CHECKING:
    from rich.table import Table

    from sam3x.bench.pipeline import PipelineMetrics, PipelineReport

COLUMNS = ("contender", "start", "first result", "median run", "peak memory", "above loaded", "detections")


def summary(report: PipelineReport) -> list[str]:
    """What the export took, and the pipeline against eager."""
    peak, weights = report.export.get("peak_rss_mb", 0) * 1.048576, report.files_mb
    lines = [
        f"{report.folder}: {report.origin}",
        f"exported in {report.export.get('total_seconds', 0):,.0f} s, peak memory {peak:,.0f} MB, "
        f"{peak / weights:.2f} of the {weights:,.0f} MB of files",
    ]
    if report.ratio is not None:
        cpu = "" if report.cpu_ratio is None else f", CPU time {report.cpu_ratio:.2f}"
        lines.append(f"latency {report.ratio:.2f} of eager{cpu}, scores within {report.largest_score_gap:.1e}")
    return lines


def table(report: PipelineReport) -> Table:
    """Rich table of the contenders."""
    from sam3x.cli.views import plain_table

    shown = plain_table(f"{report.threads} threads", *COLUMNS)
    for name, item in report.contenders.items():
        shown.add_row(name, *_cells(item))
    return shown


def markdown(report: PipelineReport, command: str, export_command: str) -> str:
    """A page that names its commands."""
    return "\n".join([*_page(report, command, export_command), ""])


def _page(report: PipelineReport, command: str, export_command: str) -> Iterator[str]:
    yield from (f"# Pipeline benchmark: {report.origin}", "")
    yield from ("Made by the commands below; a figure here is changed by running them again.", "")
    yield from ("```", export_command, command, "```", "")
    picture = report.picture or "A picture of noise, 1008×1008 pixels,"
    what = "its features drawn at random, and one click on its middle" if report.click else "and one prompt"
    yield f"{picture} {what}, {report.threads} threads. Each contender runs in a process of its own, loaded first, then"
    yield from ("in turn; ratios are medians of the rounds' own.", "")
    yield f"- Machine: {machine_text(report.machine)}"
    yield f"- Versions: {versions_text(report.machine)}"
    yield from (f"- {line[0].upper()}{line[1:]}" for line in summary(report)[1:])
    yield from ("", f"| {' | '.join(COLUMNS)} |", f"|---|{'---:|' * (len(COLUMNS) - 1)}")
    yield from (f"| {name} | {' | '.join(_cells(item))} |" for name, item in report.contenders.items())
    yield from ("", "| component | export | file | off, of its largest value |", "|---|---:|---:|---:|")
    for name, part in report.components.items():
        off = "" if part.off is None else f"{part.off:.1e}"
        yield f"| `{name}` | {part.seconds:,.1f} s | {part.file_mb:,.1f} MB | {off} |"
    yield from ("", "- **start**: from the start of the process to open files, every hash compared (eager: to a loaded model).")
    yield "- **first result**: from there; a component's file is opened when it is first needed."
    yield "- **peak memory**: highest resident memory of the process, from its start to its end."
    yield "- **above loaded**: the same of the runs alone, above what was resident before the first. What loading has freed is"
    yield "  used again and not counted: a bound from below, most of all for eager."
    yield "- **export** of a component: capture, passes, lowering, verification."


def _cells(item: PipelineMetrics) -> tuple[str, ...]:
    seconds = (f"{value:.2f} s" for value in (item.start_seconds, item.first_seconds, item.median))
    above = "" if item.run_mb is None else f"{item.run_mb:,.0f} MB"
    return (*seconds, f"{item.peak_mb:,.0f} MB", above, str(item.detections))
