"""``sam3x bench``: the arithmetic on made-up figures, the pages, real runs of a small encoder, and contenders that fail."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from sam3x import bench, bench_html, bench_process, bench_report, bench_views, bench_worker, cli, errors
from sam3x.bench_report import BenchReport, Case, Machine, Memory, make_request, ratio_of, timing_of, with_ratios

HEAVY = ("torch", "onnx", "onnxruntime", "numpy", "rich")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


def made_up(name: str, seconds: list[float] | None, kind: str = "artifact", **others: Any) -> bench_report.Result:
    timing = timing_of(seconds, [2 * value for value in seconds]) if seconds else None
    error = None if seconds else "load: it has no <graph>"
    memory = Memory(imported=50, loaded=80, peak_load=90, peak_first=100, peak_run=200, peak=200, restarted=True)
    known = {"memory": memory if seconds else None, "error": error, **others}
    return bench_report.Result(name=name, kind=kind, timing=timing, **known)


def made_up_report(*cases: tuple[int, list[bench_report.Result]], baselines: tuple[str, ...] = ("eager",)) -> BenchReport:
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


# ---- the arithmetic


def test_a_ratio_is_taken_round_by_round() -> None:
    # the machine is three times as slow in the last round, for both: the quotients say so, the medians' quotient does not
    ratio = ratio_of([1.0, 1.2, 3.0], [2.0, 2.0, 6.0])
    assert (ratio.median, ratio.low, ratio.high, ratio.fastest) == (0.5, 0.5, 0.6, 0.5)
    timing = timing_of([3.0, 1.0, 2.0], [4.0, 6.0, 5.0])
    assert (timing.median, timing.low, timing.high, timing.cpu, timing.rounds) == (2.0, 1.0, 3.0, 5.0, (3.0, 1.0, 2.0))


def test_memory_is_counted_from_the_imports_and_from_the_loaded_encoder() -> None:
    memory = Memory(imported=50, loaded=80, peak_load=300, peak_first=150, peak_run=200, peak=300, restarted=True)
    assert (memory.above_imported, memory.above_loaded) == (250, 120)


@pytest.mark.parametrize(
    ("results", "reference"),
    [
        ([made_up("out", [1.0]), made_up("eager", [2.0], "eager"), made_up("inductor", [4.0], "inductor")], "eager"),
        ([made_up("out", [1.0]), made_up("eager", None, "eager"), made_up("inductor", [4.0], "inductor")], "inductor"),
        ([made_up("out", [1.0]), made_up("other", [2.0])], "out"),
        ([made_up("out", None), made_up("other", [2.0])], "other"),
        ([made_up("out", None)], None),
    ],
)
def test_the_reference_is_the_first_baseline_that_ran(results: list[bench_report.Result], reference: str | None) -> None:
    found, ranked = with_ratios(results, ("eager", "inductor"))
    assert found == reference
    for item in ranked:
        against = next((other.timing for other in results if other.name == reference), None)
        if item.error or item.name == reference:
            assert item.ratio is None
        else:
            assert item.timing and against and item.ratio and item.ratio.median == item.timing.median / against.median
            assert item.peak_ratio == 1


def test_a_contender_may_be_named_as_the_reference() -> None:
    fixed = Memory(imported=50, loaded=80, peak_load=90, peak_first=100, peak_run=100, peak=100, restarted=True)
    results = [made_up("runtime", [1.03]), made_up("eager", [2.0], "eager"), made_up("fixed", [1.0], memory=fixed)]
    found, (runtime, _, itself) = with_ratios(results, ("fixed", "eager"))
    assert found == "fixed" and runtime.ratio and runtime.ratio.median == 1.03 and runtime.peak_ratio == 2
    assert itself.ratio is None and itself.peak_ratio is None


@pytest.mark.parametrize(
    ("highest", "expected"), [(1.0, [0, 0.25, 0.5, 0.75, 1.0]), (9216, [0, 2500, 5000, 7500, 10000]), (0, [0, 1])]
)
def test_ticks_are_round_and_reach_the_highest(highest: float, expected: list[float]) -> None:
    assert bench_html.ticks(highest) == pytest.approx(expected)


def test_labels_at_the_ends_of_lines_do_not_cover_each_other() -> None:
    heights = sorted(bench_html._spread({"a": 100, "b": 101, "c": 290, "d": 291}, low=10, high=292).values())
    assert all(later - earlier >= 16 for earlier, later in itertools.pairwise(heights))
    assert heights[0] >= 10 and heights[-1] <= 292


# ---- the request


def test_the_command_line_of_a_request_gives_the_request_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def record(request: Any, **_: Any) -> BenchReport:
        seen.append(request)
        return made_up_report((16, [made_up("out", [1.0])]))

    monkeypatch.setattr(bench, "bench", record)
    monkeypatch.chdir(tmp_path)
    asked = make_request(
        folders=["out", "an other"],
        baselines=["eager", "inductor"],
        tokens="256,1024",
        branches=["dac=on", "pre-norm=off"],
        batch=2,
        threads=1,
        repeat=7,
        reference="inductor",
        warmup=0,
        module="small:make",
        seed=4,
    )
    command = bench_report.command_of(asked, files={"--html": "page.html", "--markdown": None})
    words = shlex.split(command)
    assert words[:2] == ["sam3x", "bench"] and words[-2:] == ["--html", "page.html"]
    assert run(*words[2:]).exit_code == 0
    assert seen == [asked]
    assert bench_report.command_of(make_request(folders=["out"])) == "sam3x bench out"


def test_names_are_short_and_different() -> None:
    names = bench_report.contender_names(make_request(folders=["a/out", "b/out", "c/eager", "d/fp16/"], baselines=["eager"]))
    assert names == {"a/out": "a/out", "b/out": "b/out", "c/eager": "c/eager", "fp16": "d/fp16/", "eager": "eager"}


BAD = {
    "nothing to run": ([], "Name an exported folder, or a --baseline"),
    "unknown baseline": (["--baseline", "egaer"], "Did you mean 'eager'?"),
    "tokens": (["--baseline", "eager", "--tokens", "256,many"], "--tokens: expected counts"),
    "no tokens": (["--baseline", "eager", "--tokens", "0"], "--tokens: expected counts"),
    "batch": (["--baseline", "eager", "--batch", "0"], "--batch: at least 1, got 0"),
    "prompt": (["--baseline", "eager", "--prompt-length", "-3"], "--prompt-length: at least 1"),
    "threads": (["--baseline", "eager", "--threads", "0"], "--threads: at least 1"),
    "repeat": (["--baseline", "eager", "--repeat", "0"], "--repeat: at least 1"),
    "warm-up": (["--baseline", "eager", "--warmup", "-1"], "--warmup: at least 0"),
    "timeout": (["--baseline", "eager", "--timeout", "0"], "--timeout: more than 0"),
    "branch": (["--baseline", "eager", "--branch", "dca=on"], "--branch: expected flags"),
    "branch value": (["--baseline", "eager", "--branch", "dac=maybe"], "--branch: expected flags"),
    "dac over an odd batch": (["--baseline", "eager", "--branch", "dac=on"], "--batch is 1"),
    "reference": (["--baseline", "eager", "--reference", "inductor"], "no contender 'inductor'; there are eager"),
    "two encoders": (["--baseline", "eager", "--checkpoint", "a.pt", "--module", "a:b"], "Give one of them"),
    "no folder": (["missing"], "missing holds no manifest.json"),
    "page in no folder": (["--baseline", "eager", "--html", "missing/page.html"], "--html: missing/page.html cannot"),
    "page is a folder": (["--baseline", "eager", "--markdown", "."], "--markdown: . cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_end_before_anything_starts(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "Worker", None)
    monkeypatch.chdir(tmp_path)
    arguments, fact = BAD[case]
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert fact in result.stderr.replace("\n", " ") and "Traceback" not in result.stderr


def test_a_bad_option_is_a_spec_error() -> None:
    with pytest.raises(errors.SpecError, match="no baseline 'torch'"):
        make_request(baselines=["torch"])


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from sam3x.cli import main
try:
    main()
except SystemExit:
    print(sorted(set(sys.modules) & set({HEAVY})))
"""
    done = subprocess.run([sys.executable, "-c", code, "bench", "--help"], capture_output=True, text=True)
    assert "--baseline" in done.stdout and done.stdout.splitlines()[-1] == "[]", done.stderr


# ---- views


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


# ---- a worker


def test_every_contender_gets_the_same_inputs() -> None:
    sizes = {"batch": 2, "tokens": 9, "prompt_length": 4}
    of_baselines = bench_worker.make_inputs(bench_worker.baseline_tensors(sizes, 8), {}, seed=1)
    flags = {"dac": False, "pre_norm": True}
    tensors = [("dac", "bool", ()), ("pre_norm", "bool", (3,)), ("tgt_mask", "float32", (9, 9)), ("tgt", "float32", (2, 9, 8))]
    of_artifact = bench_worker.make_inputs(tensors, flags, seed=1)
    assert np.array_equal(of_baselines["tgt"], of_artifact["tgt"])
    assert not np.array_equal(of_baselines["tgt"], of_baselines["query_pos"])
    assert not np.array_equal(of_baselines["tgt"], bench_worker.make_inputs(tensors, flags, seed=2)["tgt"])
    assert of_artifact["dac"].tolist() is False and of_artifact["pre_norm"].tolist() == [True] * 3
    assert np.isinf(of_artifact["tgt_mask"]).any() and not np.isinf(of_artifact["tgt_mask"]).all(axis=1).any()
    assert of_baselines["memory_key_padding_mask"].tolist() == [[False, False, False, True]] * 2
    one = bench_worker.make_inputs([("memory_key_padding_mask", "bool", (1, 1))], {}, seed=1)
    assert not one["memory_key_padding_mask"].any()  # never the whole prompt


def test_memory_is_told_in_megabytes() -> None:
    import resource

    assert 1 < bench_worker.memory() <= bench_worker.peak_memory() * 1.01
    assert bench_worker.peak_memory() <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 * 1.01


def job_of(folder: Path, **others: Any) -> dict[str, Any]:
    sizes = {"batch": 2, "tokens": 20, "prompt_length": 4}
    flags = {"dac": True, "pre_norm": True}
    return {"kind": "artifact", "path": str(folder), "sizes": sizes, "flags": flags, "seed": 0, "threads": 1, **others}


def test_an_artifact_runs_without_torch_and_with_the_threads_asked_for(default_artifact: Path) -> None:
    code = """
import io, json, sys
from sam3x import bench_worker

made = []

class Kept(bench_worker.ArtifactContender):
    def __init__(self, job):
        super().__init__(job)
        made.append(self)

bench_worker.CONTENDERS["artifact"] = Kept
events = []
bench_worker.serve(io.StringIO(sys.argv[1]), lambda event, **facts: events.append([event, facts]))
options = made[0].artifact._runner._session.get_session_options()
print(json.dumps([events, "torch" in sys.modules, options.intra_op_num_threads]))
"""
    lines = [job_of(default_artifact), {"do": "run"}, {"do": "quit"}, {"do": "run"}]
    done = subprocess.run(
        [sys.executable, "-c", code, "\n".join(map(json.dumps, lines))], capture_output=True, text=True, check=True
    )
    events, torch_imported, threads = json.loads(done.stdout)
    assert [event for event, _ in events] == ["imported", "loaded", "first_output", "ready", "ran", "done"]
    assert not torch_imported and threads == 1
    assert events[4][1]["seconds"] > 0
    memory = Memory(**events[5][1]["memory"])
    assert memory.peak >= memory.peak_load >= memory.imported > 1 and memory.peak_run >= memory.peak_first


def test_an_artifact_with_the_flag_fixed_the_other_way_is_refused() -> None:
    bench_worker.check_branch({"dac": "runtime", "pre_norm": True}, {"dac": True, "pre_norm": True})
    with pytest.raises(RuntimeError, match="exported with dac on, and dac=off was asked for"):
        bench_worker.check_branch({"dac": True}, {"dac": False})


def test_a_worker_that_is_closed_is_gone(default_artifact: Path) -> None:
    worker = bench_process.Worker(job_of(default_artifact), {}, timeout=60)
    worker.until("ready")
    seconds, cpu_seconds = worker.run()
    assert seconds > 0 and cpu_seconds >= 0
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker._process.pid, 0)


# ---- real runs

SMALL = """
import os, signal, time
from sam3x.fusion_config import FusionConfig
from sam3x.sources import build_encoder, draw_weights

def make():
    print("the factory prints")
    encoder = build_encoder(FusionConfig(d_model=32, num_layers=1, num_heads=4, dim_feedforward=64)).eval()
    draw_weights(encoder, seed=3)
    return encoder

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def hang():
    time.sleep(600)
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default_artifact: Path) -> Path:
    """A current directory with the small artifact, a damaged copy and a factory; with a trap in it."""
    shutil.copytree(default_artifact, tmp_path / "out")
    shutil.copytree(default_artifact, tmp_path / "damaged")
    graph = tmp_path / "damaged" / "fusion_encoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    (tmp_path / "small.py").write_text(SMALL)
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('taken from the current directory')")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_real_run(workplace: Path) -> None:
    baselines = ("--baseline", "eager", "--baseline", "onnx-default", "--module", "small:make")
    sizes = ("--tokens", "20,30", "--batch", "2", "--prompt-length", "5", "--branch", "dac=on")
    protocol = ("--repeat", "2", "--threads", "1", "--timeout", "120")
    files = ("--json", "--html", "page.html", "--markdown", "page.md")
    result = run("out", "damaged", *baselines, *sizes, *protocol, *files)
    assert result.exit_code == 1, result.output  # the damaged folder
    report = BenchReport.model_validate_json(result.stdout)
    assert [case.tokens for case in report.cases] == [20, 30]
    assert report.command.startswith("sam3x bench out damaged --baseline eager") and "page.html" in report.command
    for case in report.cases:
        assert [item.name for item in case.results] == ["out", "damaged", "eager", "onnx-default"]
        assert case.reference == "eager" and case.branch == {"dac": True, "pre_norm": True}
        out, damaged, eager, default = case.results
        assert damaged.error and damaged.error.startswith("load: ") and "sha256 differs" in damaged.error
        assert damaged.timing is damaged.memory is damaged.ratio is None
        for item in (out, eager, default):
            assert item.error is None and item.timing and item.memory and item.cold_start and item.cold_start > 0
            assert len(item.timing.rounds) == 2 and item.timing.low > 0
            assert item.memory.peak >= item.memory.imported > 1
        assert eager.ratio is None and out.ratio and default.ratio
        # the same weights and inputs, so the same answer
        assert out.from_reference is not None and out.from_reference < 2e-5
        assert default.from_reference is not None and default.from_reference < 2e-5
        assert eager.memory and out.memory and out.memory.imported < eager.memory.imported / 3  # no torch
        assert out.nodes and out.inner_nodes and default.nodes and default.inner_nodes == 0
        assert out.file_bytes == (workplace / "out" / "fusion_encoder.onnx").stat().st_size
        assert default.file_bytes and eager.weight_bytes and out.weight_bytes and out.weight_bytes >= eager.weight_bytes
        assert out.export_seconds and default.export_seconds and eager.export_seconds is None
        assert out.options["dac"] == "runtime"
    Page((workplace / "page.html").read_text())
    assert report.command in (workplace / "page.md").read_text()


@pytest.mark.parametrize(("factory", "fact"), [("die", "ended by SIGKILL after 'imported'"), ("hang", "no answer in 3 s")])
def test_a_contender_that_dies_or_hangs_takes_nothing_down(factory: str, fact: str, workplace: Path) -> None:
    timeout = ("--timeout", "3") if factory == "hang" else ()
    started = time.perf_counter()
    result = run(
        "out", "--baseline", "eager", "--module", f"small:{factory}", "--tokens", "20", "--repeat", "1", "--json", *timeout
    )
    assert result.exit_code == 1 and time.perf_counter() - started < 60
    (case,) = BenchReport.model_validate_json(result.stdout).cases
    out, eager = case.results
    assert out.error is None and out.timing and case.reference == "out"
    assert eager.error and fact in eager.error


def test_a_size_outside_the_range_is_the_contenders_error(workplace: Path) -> None:
    result = run("out", "--tokens", "20,8", "--repeat", "1", "--warmup", "0")
    assert result.exit_code == 1
    assert "out failed: first run: run: 'tgt' has shape [1, 8, 32]" in result.stdout.replace("\n", " ")
