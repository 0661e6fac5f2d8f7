"""What tests of ``sam3x bench`` share: the command, a report of made-up figures, a page that is well formed."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from typer.testing import Result

from sam3x.bench import report as bench_report
from sam3x.bench.report import BenchReport, Case, Machine, Memory, make_request, timing_of, with_ratios
from support import command_line


def run(*arguments: Any) -> Result:
    """``sam3x bench`` with ``arguments``."""
    return command_line.run("bench", *map(str, arguments))


def made_up(name: str, seconds: list[float] | None, kind: str = "artifact", **others: Any) -> bench_report.Result:
    """A contender that took ``seconds``, or that failed where there are none."""
    timing = timing_of(seconds, [2 * value for value in seconds]) if seconds else None
    error = None if seconds else "load: it has no <graph>"
    memory = Memory(imported=50, loaded=80, peak_load=90, peak_first=100, peak_run=200, peak=200, restarted=True)
    known = {"memory": memory if seconds else None, "error": error, **others}
    return bench_report.Result(name=name, kind=kind, timing=timing, **known)


def made_up_report(*cases: tuple[int, list[bench_report.Result]], baselines: tuple[str, ...] = ("eager",)) -> BenchReport:
    """A report of ``cases``, each a number of tokens and its contenders."""
    request = make_request(folders=["out"], baselines=baselines, tokens=[tokens for tokens, _ in cases])
    whole = []
    for tokens, results in cases:
        reference, ranked = with_ratios(results, request.baselines)
        branch = request.branches[0]
        whole.append(Case(tokens=tokens, batch=1, prompt_length=32, branch=branch, reference=reference, results=ranked))
    machine = Machine(
        cpu="A & B", cores=2, memory_mb=24e3, system="Linux", python="3.11", versions={"torch": "2"}, load_before=0.1
    )
    return BenchReport(
        command="sam3x bench out", started="now", seconds=3.0, request=request, machine=machine, cases=tuple(whole)
    )


class Page(HTMLParser):
    """Every tag closed in order, nothing loaded from elsewhere."""

    VOID = frozenset({"meta", "br", "hr", "img"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object"), tag
        assert not {"src", "href", "onload"} & {name for name, _ in attrs}
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]
