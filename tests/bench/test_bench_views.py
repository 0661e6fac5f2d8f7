"""What ``sam3x bench`` shows: one page with charts, Markdown, the terminal."""

from __future__ import annotations

import itertools

import pytest

from sam3x.bench import html as bench_html
from sam3x.bench import run as bench
from sam3x.bench import views as bench_views
from sam3x.bench.report import BenchReport
from support.bench import Page, made_up, made_up_report, run

EVIL = 'a<b>&"x"'


@pytest.fixture(scope="module")
def several() -> BenchReport:
    """Three token counts, a name that needs escaping, a contender that failed."""
    return made_up_report(
        *(
            (
                tokens,
                [
                    made_up(EVIL, [tokens / 1e3, tokens / 2e3], options={"target": "onnx", "attention": "portable"}),
                    made_up("eager", [tokens / 5e2, tokens / 1e3], "eager", weight_bytes=37_890_000),
                    made_up("inductor", None, "inductor"),
                ],
            )
            for tokens in (256, 1024, 5000)
        ),
        baselines=("eager", "inductor"),
    )


def test_the_page_is_whole_and_needs_nothing_else(several: BenchReport) -> None:
    text = bench_html.bench_page(several)
    page = Page(text)
    assert "http" not in text.replace("http-equiv", "") and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme:dark" in text
    assert page.counts["svg"] == 2 + 2 * 3 and page.counts["polyline"] == 4 and page.counts["table"] == 3
    assert "16×16" in page.all("text") and "5,000" in page.all("text")
    assert page.all("text").count("3.75 s · 0.50×") == 1  # the median of 5 and 2.5 s, half of eager's in both rounds
    assert page.all("p").count("inductor failed: load: it has no <graph>") == 3
    assert any(f"{EVIL} (attention portable)" in item for item in page.all("td"))
    assert "sam3x bench out" in page.all("code")
    assert BenchReport.model_validate_json(page.all("pre")[-1]) == several


def test_one_token_count_makes_no_line_chart() -> None:
    page = Page(bench_html.bench_page(made_up_report((16, [made_up("out", [1.0]), made_up("eager", None, "eager")]))))
    assert "polyline" not in page.counts and page.counts["svg"] == 2
    Page(bench_html.bench_page(made_up_report((16, [made_up("out", None)]), (64, [made_up("out", None)]))))


def test_the_markdown_names_its_command_and_explains_its_columns(several: BenchReport) -> None:
    text = bench_views.bench_markdown(several)
    assert "\nsam3x bench out\n" in text and "- inductor failed: load: it has no <graph>" in text
    rows = [line for line in text.splitlines() if line.startswith("| eager")]
    assert rows[0].startswith("| eager | 0.384 | 1 |") and len(rows) == 3
    head = next(line for line in text.splitlines() if line.startswith("| contender"))
    for column in bench_views.COLUMNS:
        assert f"- **{column.title}**: {column.meaning}." in text
    assert all(line.count("|") == head.count("|") for line in text.splitlines() if line.startswith("|"))


def test_the_terminal_shows_figures_ratios_and_errors(several: BenchReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "bench", lambda request, **_: several)
    result = run("--baseline", "eager")
    assert result.exit_code == 1  # a contender failed
    assert "256 tokens (16×16), batch 1, prompt 32, dac=off, pre_norm=on" in result.stdout
    assert "0.192" in result.stdout and "0.50" in result.stdout and "inductor failed: load: it has no <graph>" in result.stdout
    assert BenchReport.model_validate_json(run("--baseline", "eager", "--json").stdout) == several
    assert run("--baseline", "eager", "--quiet").stdout == ""


@pytest.mark.parametrize(
    ("highest", "expected"), [(1.0, [0, 0.25, 0.5, 0.75, 1.0]), (9216, [0, 2500, 5000, 7500, 10000]), (0, [0, 1])]
)
def test_ticks_are_round_and_reach_the_highest(highest: float, expected: list[float]) -> None:
    assert bench_html.ticks(highest) == pytest.approx(expected)


def test_labels_at_the_ends_of_lines_do_not_cover_each_other() -> None:
    heights = sorted(bench_html._spread({"a": 100, "b": 101, "c": 290, "d": 291}, low=10, high=292).values())
    assert all(later - earlier >= 16 for earlier, later in itertools.pairwise(heights))
    assert heights[0] >= 10 and heights[-1] <= 292
