"""``sam3x bench`` for real: the process that runs one contender, whole runs of a small encoder, contenders that fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam3x.bench import process as bench_process
from sam3x.bench import worker as bench_worker
from sam3x.bench.report import BenchReport, Memory
from support.bench import Page, run

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


def job_of(folder: Path, **others: Any) -> dict[str, Any]:
    sizes = {"batch": 2, "tokens": 20, "prompt_length": 4}
    flags = {"dac": True, "pre_norm": True}
    return {"kind": "artifact", "path": str(folder), "sizes": sizes, "flags": flags, "seed": 0, "threads": 1, **others}


def test_an_artifact_runs_without_torch_and_with_the_threads_asked_for(default_artifact: Path) -> None:
    code = """
import io, json, sys
from sam3x.bench import worker as bench_worker

made = []

class Kept(bench_worker.ArtifactContender):
    def __init__(self, job):
        super().__init__(job)
        made.append(self)

bench_worker.CONTENDERS["artifact"] = Kept
events = []
bench_worker.serve(io.StringIO(sys.argv[1]), lambda event, **fields: events.append([event, fields]))
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
from sam3x.fusion.config import FusionConfig
from sam3x.sources.encoder import build_encoder, draw_weights

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


@pytest.mark.long
def test_a_real_run(workplace: Path) -> None:
    baselines = ("--baseline", "eager", "--baseline", "onnx-default", "--module", "small:make")
    sizes = ("--tokens", "20,30", "--batch", "2", "--prompt-length", "5", "--branch", "dac=on")
    protocol = ("--repeat", "2", "--threads", "1", "--timeout", "120", "--profile")
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
        for item in (out, default):
            assert {"Gemm", "MatMul"} & {row.operator for row in item.profile}
        assert not eager.profile
    Page((workplace / "page.html").read_text())
    assert report.command in (workplace / "page.md").read_text()


@pytest.mark.parametrize(("factory", "fact"), [("die", "ended by SIGKILL after 'imported'"), ("hang", "no answer in 3 s")])
def test_a_contender_that_dies_or_hangs_takes_nothing_down(factory: str, fact: str, workplace: Path) -> None:
    timeout = ("--timeout", "3") if factory == "hang" else ()
    result = run(
        "out", "--baseline", "eager", "--module", f"small:{factory}", "--tokens", "20", "--repeat", "1", "--json", *timeout
    )
    assert result.exit_code == 1
    (case,) = BenchReport.model_validate_json(result.stdout).cases
    out, eager = case.results
    assert out.error is None and out.timing and case.reference == "out"
    assert eager.error and fact in eager.error


def test_a_size_outside_the_range_is_the_contenders_error(workplace: Path) -> None:
    result = run("out", "--tokens", "20,8", "--repeat", "1", "--warmup", "0")
    assert result.exit_code == 1
    assert "out failed: first run: run: 'tgt' has shape [1, 8, 32]" in result.stdout.replace("\n", " ")
