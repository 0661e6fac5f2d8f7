"""``sam3x bench`` before anything runs: the arithmetic on made-up figures, the request, bad options."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sam3x import errors
from sam3x.bench import report as bench_report
from sam3x.bench import run as bench
from sam3x.bench.report import BenchReport, Memory, make_request, ratio_of, timing_of, with_ratios
from support.bench import made_up, made_up_report, run

HEAVY = ("torch", "onnx", "onnxruntime", "numpy", "rich")


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
from sam3x.cli.app import main
try:
    main()
except SystemExit:
    print(sorted(set(sys.modules) & set({HEAVY})))
"""
    done = subprocess.run([sys.executable, "-c", code, "bench", "--help"], capture_output=True, text=True)
    assert "--baseline" in done.stdout and done.stdout.splitlines()[-1] == "[]", done.stderr
