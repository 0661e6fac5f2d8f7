"""``sam3x bench-models``: rows of whole models, each made by processes of its own, and the page of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sam3x.bench.models import Kind, ModelRow, ModelsReport, bench_models
from sam3x.bench.run import machine_of
from sam3x.cli.bench_models_views import COLUMNS, markdown
from sam3x.errors import SpecError, UnknownTargetError
from sam3x.pipeline.random_models import settle
from sam3x.sources.encoder import weights_hash
from support.command_line import run

GPU = ModelRow(
    model="sam3",
    kind="trt:fp16:sm89",
    command="sam3x export --pipeline --target trt",
    origin="random weights",
    files_mb=1700.4,
    parts={"vision_encoder": 912.3},
    export_seconds=812.0,
    export_mb=9000.0,
    reason="the engine runs on a GPU",
    activation_mb=612.0,
)
FAILED = ModelRow(model="sam3", kind="pte", command="sam3x export --pipeline", failed="no export in 1 s | at all")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("onnx", ["--target", "onnx"]),
        ("onnx:fp32", ["--target", "onnx"]),
        ("pte:fp16", ["--target", "pte", "--precision", "fp16"]),
        ("trt:fp16:sm89", ["--target", "trt", "--precision", "fp16", "--compute-capability", "sm89"]),
    ],
)
def test_a_target_with_its_precision(text: str, options: list[str]) -> None:
    assert Kind.of(text).options == options


@pytest.mark.parametrize("text", ["", "onnx:", "onnx:fp9", "onnx:fp16:sm89", "trt:fp16:sm1", "trt:fp16:sm89:x"])
def test_no_target(text: str) -> None:
    with pytest.raises(SpecError):
        Kind.of(text)
    with pytest.raises(UnknownTargetError):
        Kind.of("onxx")


def test_the_page_has_a_cell_for_every_column_and_what_failed_in_words() -> None:
    report = ModelsReport(rows=(GPU, FAILED), machine=machine_of(), threads=2, repeat=3)
    page = markdown(report, "sam3x bench-models --model sam3")
    rows = [line for line in page.splitlines() if line.startswith("| sam3")]
    assert [line.replace("\\|", "").count("|") for line in rows] == [len(COLUMNS) + 1] * 2
    assert "1,700 MB" in rows[0] and "612 MB" in rows[0] and "no export in 1 s" in rows[1]
    assert "Not verified: the engine runs on a GPU." in page and "sam3x bench-models --model sam3" in page


def test_a_row_that_fails_is_told_and_the_exit_status_says_so(tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    done = run("bench-models", "--model", "small", "--timeout", "0.01", "--markdown", page, "--json")
    assert done.exit_code == 1
    (row,) = json.loads(done.stdout)["rows"]
    assert row["failed"] == "no export in 0.01 s" and row["failed"] in page.read_text()


def test_what_was_measured_before_is_not_made_again(tmp_path: Path) -> None:
    kind, source = Kind.of("onnx"), ("--module", "nobody:has_it")
    known = GPU.model_copy(update={"command": "sam3x export --pipeline --module nobody:has_it --target onnx"})
    (tmp_path / "mine-onnx-fp32.json").write_text(known.model_dump_json())
    assert bench_models({"mine": source}, [kind], keep=tmp_path).rows == (known,)
    other = bench_models({"mine": source}, [kind], options=["--image-size", "672"], keep=tmp_path, timeout=0.01)
    assert other.rows[0].failed


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ([], "no model is named"),
        (["--model", "smal"], "no model 'smal'"),
        (["--model", "small", "--markdown", "no/such/folder.md"], "cannot be written"),
        (["--model", "small", "--target", "onnx:fp9"], "precision"),
    ],
)
def test_wrong_options_are_sentences(options: list[str], fact: str) -> None:
    done = run("bench-models", *options)
    assert done.exit_code == 2 and fact in " ".join(done.stderr.split())


def test_random_weights_do_not_depend_on_the_threads_of_the_process() -> None:
    """Figures of a kept export go on in another process, which must have its weights."""
    made, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            module = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32))
            settle(module, torch.rand((2, 3, 128, 128)))
            assert torch.get_num_threads() == count
            made.append(weights_hash(module))
    finally:
        torch.set_num_threads(threads)
    assert made[0] == made[1]


@pytest.mark.long
def test_a_small_model_is_exported_and_run_beside_eager(tmp_path: Path) -> None:
    report = bench_models(
        {"small": ("--module", "sam3x.pipeline.random_models:small_sam3")},
        [Kind.of("onnx")],
        options=["--image-size", "56"],
        keep=tmp_path,
        threshold=0.0,
        repeat=1,
    )
    (row,) = report.rows
    assert row.failed is None and row.verified and row.off is not None and row.off < 1e-5
    assert row.files_mb and row.export_seconds and row.export_mb and row.parts.keys() >= {"vision_encoder", "mask_head"}
    assert row.run is not None and row.run.contenders.keys() == {"pipeline", "eager"}
    assert row.run.largest_score_gap is not None and row.run.largest_score_gap < 1e-4
    assert (tmp_path / "small-onnx-fp32" / "manifest.json").is_file()
