"""A benchmark as one self-contained page: charts in inline SVG, no script, light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from sam3x.bench.report import BASELINES, BenchReport, Case, Result, branch_text
from sam3x.bench.views import (
    COLUMNS,
    PROFILE,
    began_text,
    case_title,
    contender_text,
    error_texts,
    machine_text,
    profile_rows,
    profile_title,
    protocol_text,
    tokens_text,
    versions_text,
    weights_text,
)
from sam3x.pages.style import STYLE

WIDTH, NAMES, VALUES = 620, 130, 112
"""Of a chart, of the names to its left and of the figures to its right, in SVG units."""


def bench_page(report: BenchReport) -> str:
    """The whole page."""
    colours = _colours(report)
    metadata = {
        "Machine": machine_text(report.machine),
        "Versions": versions_text(report.machine),
        "Began": began_text(report),
        **({"Baselines": weights_text(report.request)} if report.request.baselines else {}),
        **{name: BASELINES[name] for name in report.request.baselines},
    }
    parts = [
        "<h1>sam3x bench</h1>",
        f'<p class="soft">{escape(protocol_text(report))}</p>',
        f"<pre><code>{escape(report.command)}</code></pre>",
        "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in metadata.items()) + "</dl>",
        *_growth(report, colours),
        *(_section(case, colours) for case in report.cases),
        "<h2>What the columns mean</h2><dl>",
        *(f"<dt>{escape(column.title)}</dt><dd>{escape(column.meaning)}</dd>" for column in COLUMNS),
        "</dl>",
        f"<details><summary>All figures as JSON</summary><pre>{escape(report.model_dump_json(indent=1))}</pre></details>",
    ]
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>sam3x bench</title><style>{STYLE}</style></head>"
    )
    return "\n".join([head, "<body><main>", *parts, "</main></body></html>"]) + "\n"


def _colours(report: BenchReport) -> dict[str, str]:
    """Artifacts in colour, baselines in muted tones, the same on the whole page."""
    colours: dict[str, str] = {}
    counts = {"a": 0, "b": 0}
    for case in report.cases:
        for item in case.results:
            if item.name not in colours:
                family, size = ("a", 6) if item.kind == "artifact" else ("b", 4)
                colours[item.name] = f"var(--{family}{counts[family] % size})"
                counts[family] += 1
    return colours


def _section(case: Case, colours: dict[str, str]) -> str:
    timed = [item for item in case.results if item.timing]
    held = [item for item in case.results if item.memory]
    charts = []
    if timed:
        caption = "Median and range of the timed rounds; × is the ratio with the dashed line."
        charts.append(_figure("Latency", _latency_bars(case, timed, colours), caption))
    if held:
        caption = "Pale: libraries imported. Middle: encoder loaded. Full: highest while running. The figure is the peak."
        charts.append(_figure("Peak resident memory", _memory_bars(held, colours), caption))
    return "\n".join(
        [
            f"<h2>{escape(case_title(case))}</h2>",
            f'<div class="charts">{"".join(charts)}</div>',
            _table(case, colours),
            f'<p class="soft">Ratios are against {escape(case.reference)}.</p>' if case.reference else "",
            *(f'<p class="bad">{escape(text)}</p>' for text in error_texts(case)),
            *(_profile(item) for item in case.results if item.profile),
        ]
    )


def _profile(item: Result) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in PROFILE)
    rows = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in profile_rows(item)]
    table = f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<h3>{escape(profile_title(item))}</h3>{table}"


def _table(case: Case, colours: dict[str, str]) -> str:
    columns = [column for column in COLUMNS if any(column.text(item) for item in case.results)]
    head = "".join(f'<th title="{escape(column.meaning)}">{escape(column.title)}</th>' for column in columns)
    rows = []
    for item in case.results:
        name = f'<i class="dot" style="background:{colours[item.name]}"></i>{escape(contender_text(item))}'
        rows.append(f"<tr><td>{name}</td>" + "".join(f"<td>{escape(column.text(item))}</td>" for column in columns) + "</tr>")
    head = f"<thead><tr><th>contender</th>{head}</tr></thead>"
    return f'<div class="table"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _figure(title: str, svg: str, caption: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _short(name: str, length: int = 19) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def seconds_text(value: float) -> str:
    """Milliseconds below a tenth of a second."""
    return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value:.2f} s"


def ticks(highest: float, about: int = 4) -> list[float]:
    """Round numbers from 0 to at least ``highest``."""
    if highest <= 0:
        return [0.0, 1.0]
    rough = highest / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [step * index for index in range(math.ceil(highest / step - 1e-9) + 1)]


# ---- bars


ROW, BAR, TOP = 30, 17, 8


def _bar_frame(highest: float, count: int, label: Callable[[float], str]) -> tuple[Callable[[float], float], list[str]]:
    """Scale from a value to x, and the grid with its labels."""
    marks = ticks(highest)
    room = WIDTH - NAMES - VALUES
    bottom = TOP + ROW * count

    def x(value: float) -> float:
        return NAMES + room * value / marks[-1]

    parts = []
    for mark in marks:
        parts.append(f'<line class="grid" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(_text(x(mark), bottom + 15, label(mark), anchor="middle", kind="soft"))
    return x, parts


def _latency_bars(case: Case, timed: Sequence[Result], colours: dict[str, str]) -> str:
    x, parts = _bar_frame(max(item.timing.high for item in timed if item.timing), len(timed), lambda v: f"{v:g} s")
    for row, item in enumerate(timed):
        timing = item.timing
        assert timing is not None
        y = TOP + ROW * row + (ROW - BAR) / 2
        middle = y + BAR / 2
        figure = seconds_text(timing.median) + (f" · {item.ratio.median:.2f}×" if item.ratio else "")
        tip = f"{item.name}: {seconds_text(timing.median)}, {seconds_text(timing.low)} to {seconds_text(timing.high)}"
        parts += [
            f"<g><title>{escape(tip)}</title>",
            _text(NAMES - 8, middle + 4, _short(item.name), anchor="end"),
            _bar(NAMES, x(timing.median), y, colours[item.name]),
            f'<line class="whisker" x1="{x(timing.low):.1f}" x2="{x(timing.high):.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>',
            *(
                f'<line class="whisker" x1="{x(end):.1f}" x2="{x(end):.1f}" y1="{middle - 3:.1f}" y2="{middle + 3:.1f}"/>'
                for end in (timing.low, timing.high)
            ),
            _text(WIDTH, middle + 4, figure, anchor="end", kind="strong"),
            "</g>",
        ]
    reference = case.result(case.reference or "")
    if reference and reference.timing:
        at = x(reference.timing.median)
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{TOP + ROW * len(timed)}"/>')
    return _svg(TOP + ROW * len(timed) + 22, f"Latency: {case_title(case)}", parts)


def _bar(left: float, right: float, y: float, colour: str, opacity: float = 1.0) -> str:
    width = max(right - left, 0.0)
    return f'<rect x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BAR}" fill="{colour}" opacity="{opacity}"/>'


def _memory_bars(held: Sequence[Result], colours: dict[str, str]) -> str:
    x, parts = _bar_frame(max(item.memory.peak for item in held if item.memory), len(held), lambda v: f"{v:,.0f} MB")
    for row, item in enumerate(held):
        memory = item.memory
        assert memory is not None
        y = TOP + ROW * row + (ROW - BAR) / 2
        imported, loaded = min(memory.imported, memory.peak), min(max(memory.loaded, memory.imported), memory.peak)
        tip = f"{item.name}: {memory.imported:,.0f} MB imported, {memory.loaded:,.0f} loaded, {memory.peak:,.0f} at the peak"
        parts += [
            f"<g><title>{escape(tip)}</title>",
            _text(NAMES - 8, y + BAR / 2 + 4, _short(item.name), anchor="end"),
            _bar(NAMES, x(imported), y, colours[item.name], 0.25),
            _bar(x(imported), x(loaded), y, colours[item.name], 0.55),
            _bar(x(loaded), x(memory.peak), y, colours[item.name]),
            _text(WIDTH, y + BAR / 2 + 4, f"{memory.peak:,.0f} MB", anchor="end", kind="strong"),
            "</g>",
        ]
    return _svg(TOP + ROW * len(held) + 22, "Peak resident memory", parts)


# ---- lines


def _growth(report: BenchReport, colours: dict[str, str]) -> list[str]:
    """Cost against the token count, where there are several; one pair of charts a branch."""
    parts = []
    for branch in report.request.branches:
        cases = sorted((case for case in report.cases if case.branch == branch), key=lambda case: case.tokens)
        if len(cases) < 2:
            continue
        names = list(dict.fromkeys(item.name for case in cases for item in case.results))
        dashed = {item.name for case in cases for item in case.results if item.kind != "artifact"}

        def series(value: Callable[[Result], float | None], names: list[str] = names, cases: list[Case] = cases) -> _Series:
            found: _Series = {}
            for name in names:
                points = [(case.tokens, value(item)) for case in cases if (item := case.result(name))]
                found[name] = [(tokens, y) for tokens, y in points if y is not None]
            return {name: points for name, points in found.items() if points}

        seconds = series(lambda item: item.timing.median if item.timing else None)
        megabytes = series(lambda item: item.memory.above_loaded if item.memory else None)
        suffix = f", {branch_text(branch).replace(',', ', ')}" if len(report.request.branches) > 1 else ""
        charts = [
            _figure(
                "Latency by tokens",
                _line_chart(seconds, lambda v: f"{v:g} s", colours, dashed),
                "Median of the timed rounds. Attention's share grows with the square of the tokens.",
            ),
            _figure(
                "Memory of a run by tokens",
                _line_chart(megabytes, lambda v: f"{v:,.0f} MB", colours, dashed),
                "Peak while running, over the loaded encoder. A straight line is linear growth.",
            ),
        ]
        parts.append(f'<h2>How cost grows{escape(suffix)}</h2>\n<div class="charts">{"".join(charts)}</div>')
    return parts


_Series = dict[str, list[tuple[int, float]]]
LEFT, RIGHT, HEIGHT = 64, 132, 300


def _line_chart(series: _Series, label: Callable[[float], str], colours: dict[str, str], dashed: set[str]) -> str:
    if not series:
        return _svg(40, "No figures", [_text(0, 24, "No contender ran.", kind="soft")])
    counts = sorted({tokens for points in series.values() for tokens, _ in points})
    marks = ticks(max(y for points in series.values() for _, y in points))
    bottom = HEIGHT - 30

    def x(tokens: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * tokens / counts[-1]

    def y(value: float) -> float:
        return bottom - (bottom - TOP) * value / marks[-1]

    parts = []
    for mark in marks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        parts.append(_text(LEFT - 8, y(mark) + 4, label(mark), anchor="end", kind="soft"))
    free = math.inf
    for tokens in reversed(counts):  # from the right, where there is room
        if free - x(tokens) >= 44:
            parts.append(_text(x(tokens), bottom + 18, tokens_text(tokens), anchor="middle", kind="soft"))
            free = x(tokens)
    for name, points in series.items():
        path = " ".join(f"{x(tokens):.1f},{y(value):.1f}" for tokens, value in points)
        style = "line dashed" if name in dashed else "line"
        parts.append(f'<polyline class="{style}" points="{path}" style="stroke:{colours[name]}"/>')
        for tokens, value in points:
            tip = escape(f"{name}, {tokens_text(tokens)}: {label(round(value, 4))}")
            place = f'cx="{x(tokens):.1f}" cy="{y(value):.1f}" r="3.5"'
            parts.append(f'<circle {place} style="fill:{colours[name]}"><title>{tip}</title></circle>')
    ends = {name: y(points[-1][1]) for name, points in series.items()}
    for name, at in _spread(ends, TOP + 6, bottom).items():
        last = series[name][-1]
        parts.append(
            f'<line x1="{x(last[0]) + 5:.1f}" y1="{ends[name]:.1f}" x2="{WIDTH - RIGHT + 14}" y2="{at:.1f}" '
            f'style="stroke:{colours[name]}" opacity="0.5"/>'
        )
        parts.append(_text(WIDTH - RIGHT + 18, at + 4, _short(name, 18)))
    return _svg(HEIGHT, "Cost by token count", parts)


def _spread(wanted: dict[str, float], low: float, high: float, gap: float = 16) -> dict[str, float]:
    """Heights of labels, moved apart until none covers another."""
    order = sorted(wanted, key=lambda name: wanted[name])
    heights: dict[str, float] = {}
    previous = low - gap
    for name in order:
        heights[name] = previous = max(wanted[name], previous + gap)
    limit = high
    for name in reversed(order):
        heights[name] = limit = min(heights[name], limit)
        limit -= gap
    return heights
