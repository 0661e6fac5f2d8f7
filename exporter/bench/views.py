"""The figures of a benchmark as text: one list of columns for the terminal, for Markdown and for the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sam3x.bench.report import BASELINES, BenchReport, BenchRequest, Case, Machine, Result, branch_text

if TYPE_CHECKING:
    from rich.console import RenderableType

MEGABYTE = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One figure of a contender. ``text`` gives an empty string where there is none; ``wide``: not in the terminal's table."""

    title: str
    meaning: str
    text: Callable[[Result], str]
    wide: bool = False


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _megabytes(count: int | None, digits: int = 1) -> str:
    return "" if count is None else f"{count / MEGABYTE:,.{digits}f}"


def _ratio(result: Result) -> str:
    return f"{result.ratio.median:.2f}" if result.ratio else "1" if result.timing and not result.error else ""


def _nodes(result: Result) -> str:
    if result.nodes is None:
        return ""
    return f"{result.nodes} + {result.inner_nodes}" if result.inner_nodes else str(result.nodes)


def _exported(result: Result) -> str:
    return ", ".join(f"{name} {value}" for name, value in result.options.items() if name != "target")


COLUMNS = (
    Column(
        title="seconds",
        meaning="median of the timed rounds",
        text=lambda r: "failed" if r.error else f"{r.timing.median:.3f}" if r.timing else "",
    ),
    Column(
        title="ratio",
        meaning="median of the quotients with the reference, taken round by round",
        text=_ratio,
    ),
    Column(
        title="of the fastest",
        meaning="quotient of the fastest round and the reference's fastest; other work on the machine makes rounds slower only",
        text=lambda r: f"{r.ratio.fastest:.2f}" if r.ratio else "",
    ),
    Column(
        title="lowest to highest",
        meaning="of those quotients",
        text=lambda r: f"{r.ratio.low:.2f} to {r.ratio.high:.2f}" if r.ratio else "",
    ),
    Column(
        title="seconds, lowest to highest",
        meaning="of the timed rounds",
        text=lambda r: f"{r.timing.low:.3f} to {r.timing.high:.3f}" if r.timing else "",
        wide=True,
    ),
    Column(
        title="CPU s",
        meaning="median of the user and system seconds of a round, all threads together",
        text=lambda r: f"{r.timing.cpu:.3f}" if r.timing else "",
        wide=True,
    ),
    Column(
        title="peak MB",
        meaning="highest resident memory of the process, from its start to its end",
        text=lambda r: _number(r.memory.peak, 0) if r.memory else "",
    ),
    Column(
        title="peak ratio",
        meaning="its peak over the reference's",
        text=lambda r: f"{r.peak_ratio:.2f}" if r.peak_ratio else "1" if r.memory and not r.error else "",
    ),
    Column(
        title="over imports",
        meaning="the peak less what the process held once its libraries were imported, MB",
        text=lambda r: _number(r.memory.above_imported, 0) if r.memory else "",
        wide=True,
    ),
    Column(
        title="over loaded",
        meaning="the peak while it ran less what the process held before the first run, MB",
        text=lambda r: _number(r.memory.above_loaded, 0) if r.memory else "",
    ),
    Column(
        title="first run MB",
        meaning="highest resident memory until the first run was over",
        text=lambda r: _number(max(r.memory.peak_load, r.memory.peak_first), 0) if r.memory else "",
        wide=True,
    ),
    Column(
        title="loaded MB",
        meaning="resident memory before the first run",
        text=lambda r: _number(r.memory.loaded, 0) if r.memory else "",
        wide=True,
    ),
    Column(
        title="cold start",
        meaning="seconds from the start of the process to its first output; a first start may read its files from the disk",
        text=lambda r: _number(r.cold_start, 2),
    ),
    Column(
        title="export",
        meaning="seconds: an artifact's capture, passes and lowering, from its manifest; torch.onnx.export for onnx-default, "
        "in this run",
        text=lambda r: _number(r.export_seconds, 1),
    ),
    Column(title="file MB", meaning="graph and weights on disk", text=lambda r: _megabytes(r.file_bytes)),
    Column(
        title="weights MB",
        meaning="of the weights in the file, or of the module's parameters",
        text=lambda r: _megabytes(r.weight_bytes),
        wide=True,
    ),
    Column(title="nodes", meaning="of the graph, then those of its branches' sub-graphs", text=_nodes),
    Column(
        title="off",
        meaning="largest difference of its first output from the reference's; blank where their weights differ",
        text=lambda r: "" if r.from_reference is None else f"{r.from_reference:.0e}",
    ),
)
"""In order; the contender's name comes before them."""


def tokens_text(tokens: int) -> str:
    """``72×72`` where the count is a square, the count otherwise."""
    side = math.isqrt(tokens)
    return f"{side}×{side}" if side * side == tokens else f"{tokens:,}"


def case_title(case: Case) -> str:
    """What the contenders of a case were given."""
    square = tokens_text(case.tokens)
    tokens = f"{case.tokens:,} tokens" + (f" ({square})" if "×" in square else "")
    return f"{tokens}, batch {case.batch}, prompt {case.prompt_length}, {branch_text(case.branch).replace(',', ', ')}"


def contender_text(result: Result) -> str:
    """Name, and what was asked for when it was exported."""
    exported = _exported(result)
    return f"{result.name} ({exported})" if exported else result.name


def machine_text(machine: Machine) -> str:
    """One line: processor, memory, system."""
    parts = [machine.cpu, f"{machine.cores} core{'' if machine.cores == 1 else 's'}"]
    parts += [f"{machine.memory_mb / 1000:,.0f} GB"] if machine.memory_mb else []
    return ", ".join([*parts, machine.system])


def versions_text(machine: Machine) -> str:
    """Python and the libraries."""
    return ", ".join([f"Python {machine.python}", *(f"{name} {version}" for name, version in machine.versions.items())])


def protocol_text(report: BenchReport) -> str:
    """How it was measured, in one paragraph."""
    asked = report.request
    rounds = f"{asked.repeat} timed round{'' if asked.repeat == 1 else 's'}"
    threads = f"{asked.threads} thread{'' if asked.threads == 1 else 's'}"
    return (
        f"Each contender runs in a process of its own with {threads}. All of them are loaded first; then they run in turn, "
        f"one run each a round: {asked.warmup} to warm up, {rounds}. Every contender is given the same seeded inputs. "
        "Ratios are against one of them, the reference, which each table names."
    )


def began_text(report: BenchReport) -> str:
    """When it began, what it took, and how busy the machine was before."""
    load = report.machine.load_before
    busy = "" if load is None else f", load average before it began {load:.2f}"
    return f"{report.started}, took {report.seconds:.0f} s{busy}"


def weights_text(request: BenchRequest) -> str:
    """Where the baselines' weights come from."""
    if request.checkpoint is not None:
        return f"checkpoint {request.checkpoint}"
    return f"module {request.module}" if request.module else f"SAM3's hyper-parameters, random weights, seed {request.seed}"


def error_texts(case: Case) -> list[str]:
    """One sentence for each contender that failed."""
    return [f"{item.name} failed: {item.error}" for item in case.results if item.error]


PROFILE = ("operator", "calls", "ms", "share")
_PROFILE_ROWS = 15


def profile_title(result: Result) -> str:
    """Above the time by operator of one contender."""
    return f"{result.name}: time by operator, one run"


def profile_rows(result: Result) -> list[tuple[str, str, str, str]]:
    """The slowest operators, the others as one row."""
    rows = list(result.profile)
    shown, others = rows[:_PROFILE_ROWS], rows[_PROFILE_ROWS:]
    lines = [(row.operator, f"{row.calls:,}", f"{row.milliseconds:,.2f}", f"{100 * row.share:.1f} %") for row in shown]
    if others:
        time, share = sum(row.milliseconds for row in others), sum(row.share for row in others)
        lines.append((f"{len(others)} others", f"{sum(row.calls for row in others):,}", f"{time:,.2f}", f"{100 * share:.1f} %"))
    return lines


# ---- the terminal


def bench_view(report: BenchReport) -> list[RenderableType]:
    """A table for each case, errors below it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text(machine_text(report.machine), style="dim")]
    for case in report.cases:
        columns = [column for column in COLUMNS if not column.wide and any(column.text(item) for item in case.results)]
        table = Table(
            title=case_title(case),
            title_justify="left",
            title_style="bold",
            caption_justify="left",
            box=None,
            padding=(0, 1, 0, 0),
        )
        table.add_column("contender", header_style="dim", overflow="fold")
        for column in columns:
            table.add_column(column.title, justify="right", header_style="dim")
        for item in case.results:
            style = "bold" if item.name == case.reference else "red" if item.error else ""
            table.add_row(Text(item.name, style=style), *(column.text(item) for column in columns))
        if case.reference:
            table.caption = f"ratio, off: against {case.reference}. Memory in MB."
        parts.append(Group(Text(""), table, *(Text(text, style="red") for text in error_texts(case))))
        for item in case.results:
            if item.profile:
                profile = Table(title=profile_title(item), title_justify="left", box=None, padding=(0, 1, 0, 0))
                profile.add_column(PROFILE[0], header_style="dim", overflow="fold")
                for title in PROFILE[1:]:
                    profile.add_column(title, justify="right", header_style="dim")
                for row in profile_rows(item):
                    profile.add_row(*row)
                parts.append(Group(Text(""), profile))
    return parts


# ---- Markdown


def bench_markdown(report: BenchReport) -> str:
    """A page that names its command, with every column explained."""
    asked = report.request
    lines = [
        "# Benchmarks",
        "",
        "Made by the command below; a figure here is changed by running it again.",
        "",
        "```",
        report.command,
        "```",
        "",
        protocol_text(report),
        "",
        f"- Machine: {machine_text(report.machine)}",
        f"- Versions: {versions_text(report.machine)}",
        f"- Began {began_text(report)}",
    ]
    lines += [f"- Encoder of the baselines: {weights_text(asked)}"] if asked.baselines else []
    lines += [f"- `{name}`: {BASELINES[name]}" for name in asked.baselines]
    for name, text in {item.name: _exported(item) for case in report.cases for item in case.results}.items():
        lines += [f"- `{name}`: exported with {text}"] if text else []
    for case in report.cases:
        columns = [column for column in COLUMNS if any(column.text(item) for item in case.results)]
        lines += ["", f"## {case_title(case)}", ""]
        lines += ["| contender | " + " | ".join(column.title for column in columns) + " |"]
        lines += ["|---|" + "---:|" * len(columns)]
        for item in case.results:
            lines.append(f"| {_cell(item.name)} | " + " | ".join(_cell(column.text(item)) for column in columns) + " |")
        lines += ["", f"Reference: {case.reference}."] if case.reference else []
        lines += ["", *(f"- {text}" for text in error_texts(case))] if error_texts(case) else []
        for item in case.results:
            if item.profile:
                lines += ["", f"### {profile_title(item)}", "", "| " + " | ".join(PROFILE) + " |", "|---|---:|---:|---:|"]
                lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in profile_rows(item)]
    lines += ["", "## Columns", "", *(f"- **{column.title}**: {column.meaning}." for column in COLUMNS)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
