"""The precision doctor's report as tables for the terminal and as one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from sam3x.pages.style import STYLE
from sam3x.precision.doctor_report import DoctorReport, OperationReport, command_of

if TYPE_CHECKING:
    from rich.console import RenderableType

ROWS, OF_SEVERAL = 20, 8
"""Of the terminal's table, and where there is one for each component; the page and the JSON have all."""

MEANINGS = {
    "operation": "module or layer it belongs to; what sam3x export --fp32-ops takes",
    "error alone": "largest distance of the outputs from eager float32, this operation alone in the low precision, the worst "
    "of all branches; absolute of a fusion encoder, elsewhere of the largest value of each output",
    "cosine": "of the outputs as vectors, in the same run",
    "peak": "largest magnitude of its result in float32",
}


def doctor_view(reports: Sequence[DoctorReport]) -> list[RenderableType]:
    """Of each component the verdict and the worst operations; then the export that is proposed."""
    from rich.text import Text

    parts = [part for report in reports for part in _report_view(report, ROWS if len(reports) == 1 else OF_SEVERAL)]
    return [*parts, Text(command_of(reports), style="bold")]


def _report_view(report: DoctorReport, rows: int) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), title="Operations, worst first", title_justify="left", title_style="bold")
    for name in ("operation", "kind"):
        table.add_column(name, header_style="dim", overflow="fold")
    for name in ("error alone", "cosine", "peak", "in float32"):
        table.add_column(name, justify="right", header_style="dim")
    for row in report.operations[:rows]:
        table.add_row(*cells(row), "yes" if row.in_float32 else "", style="bold" if row.in_float32 else "")
    more = len(report.operations) - rows
    parts: list[RenderableType] = [Text(_sentence(report)), table]
    if more > 0:
        parts.append(Text(f"{more} more in --json and --html", style="dim"))
    return parts


def cells(row: OperationReport) -> tuple[str, str, str, str, str]:
    """Path, kind and figures in words."""
    error = "not finite" if math.isinf(row.max_abs) else f"{row.max_abs:.1e}"
    peak = f"{row.peak:.3g}" + (", overflows" if row.overflows else "")
    return row.path, row.kind, error, f"{row.cosine:.6f}", peak


def _sentence(report: DoctorReport) -> str:
    text = report.verdict
    return f"{report.component}: {text}" if report.component else text[0].upper() + text[1:]


def doctor_page(reports: Sequence[DoctorReport]) -> str:
    """One page, no script, nothing fetched."""
    parts = [
        "<h1>sam3x doctor</h1>",
        f"<pre><code>{escape(command_of(reports))}</code></pre>",
        *(part for report in reports for part in _section(report)),
        "<h2>What the columns mean</h2><dl>",
        *(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in MEANINGS.items()),
        "</dl>",
        *(
            f"<details><summary>All figures{_of(report)} as JSON</summary><pre>{escape(report.model_dump_json(indent=1))}</pre>"
            "</details>"
            for report in reports
        ),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>sam3x doctor, {escape(reports[0].precision)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _of(report: DoctorReport) -> str:
    return f" of {escape(report.component)}" if report.component else ""


def _section(report: DoctorReport) -> list[str]:
    """The verdict on a component, what was run, and its operations."""
    worst = max((row.max_abs for row in report.operations if math.isfinite(row.max_abs)), default=0.0) or 1.0
    body = "".join(_row(row, worst) for row in report.operations)
    unit = "of the largest value of each output" if report.scaled else "absolute"
    metadata = {
        "Precision": report.precision,
        "Bound": f"{report.bound:g} {unit}, against eager float32",
        "Weights": report.origin,
        "Branches": ", ".join(report.branches),
        "Sizes": ", ".join(report.cases),
        "Everything low": f"{report.max_abs:.3g}, cosine {report.cosine:.6f}",
        "With float32 operations": f"{report.max_abs_with_fp32_ops:.3g}, cosine {report.cosine_with_fp32_ops:.6f}",
    }
    return [
        f"<h2>{escape(report.component)}</h2>" if report.component else "",
        f"<p>{escape(_sentence(report))}</p>",
        "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in metadata.items()) + "</dl>",
        f'<h2>Operations{_of(report)}, worst first</h2><div class="table"><table>',
        "<tr><th>operation</th><th>kind</th><th>error alone</th><th></th>"
        f"<th>cosine</th><th>peak</th><th>in float32</th></tr>{body}</table></div>",
    ]


def _row(row: OperationReport, worst: float) -> str:
    path, kind, error, cosine, peak = (escape(cell) for cell in cells(row))
    share = 1.0 if math.isinf(row.max_abs) else row.max_abs / worst
    colour = "var(--bad)" if row.in_float32 else "var(--a0)"
    bar = (
        f'<svg viewBox="0 0 120 10" width="120" height="10" role="img" aria-label="{error}">'
        f'<rect width="{max(1.0, 120 * share):.1f}" height="10" rx="2" fill="{colour}"/></svg>'
    )
    kept = "yes" if row.in_float32 else ""
    return (
        f"<tr><td>{path}</td><td>{kind}</td><td>{error}</td><td>{bar}</td><td>{cosine}</td><td>{peak}</td><td>{kept}</td></tr>"
    )
