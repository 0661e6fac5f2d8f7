"""The command line: the request it makes, what it prints, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from pydantic import Field

from sam3x import __version__, errors
from sam3x.artifact.manifest import ComponentSpec, Manifest, MatchFailureRecord, PassRecordModel, TensorSpec, VerificationRecord
from sam3x.pipeline import export as exporter
from sam3x.pipeline.request import Request, resolve
from sam3x.sources import encoder as sources
from sam3x.targets import registry
from sam3x.targets.onnx.target import OnnxOptions, OnnxTarget
from support.command_line import run

MANIFEST = Manifest(
    target="onnx",
    opset=18,
    components=(
        ComponentSpec(
            name="fusion_encoder", file="fusion_encoder.onnx", reads={"tgt": "tgt", "dac": "dac"}, writes={"output": "output"},
            inputs=(
                TensorSpec(name="tgt", dtype="float32", shape=("batch", "tokens", 32)),
                TensorSpec(name="dac", dtype="bool", shape=()),
            ),
            outputs=(TensorSpec(name="output", dtype="float32", shape=("batch", "tokens", 32)),),
            ranges={"batch": (1, 8)},
            passes=(
                PassRecordModel(
                    name="canonicalize_attention", modified=True, rewrites=11, nodes_before=40, nodes_after=30, seconds=0.1,
                    match_failures=(MatchFailureRecord(node="softmax_3", reason="scores [B, H] used elsewhere"),),
                    max_change=1e-7,
                ),
            ),
            verification=(
                VerificationRecord(
                    branch="dac=True", case="batch 2", output="output", max_abs=1.3e-6, max_rel=1e-7, from_float64=1e-6,
                    eager_from_float64=1e-6, allowed=2e-5, passed=True,
                ),
            ),
        ),
    ),
    spec={"dac": "runtime", "pre_norm": "runtime", "dac_dim": 0},
    origin="random weights, seed 0",
    weights_sha256="ab" * 32,
    versions={"sam3x": __version__},
    verified=True,
    files={"fusion_encoder.onnx": "cd" * 32},
    metrics={"total_seconds": 12.5, "peak_rss_mb": 1090.4, "something_new": 3.0},
    notes=("a note [in brackets]",),
)  # fmt: skip


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What ``export_model`` was called with; nothing is exported."""
    calls: dict[str, Any] = {}

    def fake(request: Request, cut: Any, output: Path, *, tokenizer: Path | None, progress: Any) -> Manifest:
        calls.update(request=request, cut=cut, output=output, tokenizer=tokenizer)
        for step in ("source", "capture", "passes", "lower to onnx", "verify"):
            progress(step)
        print("a library prints")
        return MANIFEST

    monkeypatch.setattr(exporter, "export_model", fake)
    monkeypatch.chdir(tmp_path)
    return calls


# ---- options become keywords of api.export


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--interface", "tokens"], {"interface": "tokens"}),
        (["--interface", "feature-maps"], {"interface": "feature_maps"}),
        (["--inputs", "tgt, memory,pos"], {"inputs": "tgt, memory,pos"}),
        (["--dac", "runtime"], {"dac": "runtime"}),
        (["--dac", "on"], {"dac": True}),
        (["--dac", "off"], {"dac": False}),
        (["--pre-norm", "runtime"], {"pre_norm": "runtime"}),
        (["--pre-norm", "on"], {"pre_norm": True}),
        (["--pre-norm", "off"], {"pre_norm": False}),
        (["--pre-norm", "module"], {"pre_norm": "module"}),
        (["--pre-norm", "per-layer"], {"pre_norm": "per-layer"}),
        (["--dac-dim", "0"], {"dac_dim": 0}),
        (["--dac-dim", "1"], {"dac_dim": 1}),
        (["--batch", "1:8", "--tokens", "5184"], {"batch": "1:8", "tokens": "5184"}),
        (["--prompt-length", "1:77"], {"prompt_length": "1:77"}),
        (
            ["--interface", "feature-maps", "--feature-sizes", "72x72,36X36"],
            {"interface": "feature_maps", "feature_sizes": "72x72,36X36"},
        ),
        (["--branches", "select"], {"branches": "select"}),
        (["--mask-dtype", "float32"], {"mask_dtype": "float32"}),
        (["--verify", "off"], {"verify": "off"}),
        (["--verify", "full"], {"verify": "full"}),
        (["--seed", "0"], {"seed": 0}),
        (["--external-data"], {"external_data": True}),
        (["--attention", "ort", "--attention-memory", "64MB"], {"attention": "ort", "attention_memory": "64MB"}),
    ],
)  # fmt: skip
def test_options_reach_the_api_and_unset_ones_do_not(
    seen: dict[str, Any], arguments: list[str], expected: dict[str, Any]
) -> None:
    result = run("export", *arguments)
    assert result.exit_code == 0, result.stderr
    assert seen["output"] == Path("out")
    got, wanted = seen["request"], resolve("onnx", expected)
    for name in ("spec", "options", "components", "fuse", "disable_pass", "dump_graphs"):
        assert getattr(got, name) == getattr(wanted, name), name


class TheirOptions(OnnxOptions):
    mood: Literal["calm", "brisk"] = Field("calm", description="how it runs.")
    depth: int = 2
    rounded: bool = True
    places: tuple[str, ...] | None = Field(None, json_schema_extra={"metavar": "A,B"})


def test_a_target_of_another_package_has_its_options_on_the_command_line(
    seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = type("Theirs", (OnnxTarget,), {"name": "theirs", "options_type": TheirOptions})
    monkeypatch.setattr(registry, "entry_points", lambda group: [SimpleNamespace(name="theirs", load=lambda: theirs)])
    shown = run("export", "-t", "theirs", "--help").stdout
    assert "--mood <calm|brisk>" in shown and "theirs: how it runs." in shown and "--places A,B" in shown
    assert "--mood" not in run("export", "--help").stdout
    assert "--mood" in run("export", "-t", "theirs", "--mood", "wild").stderr
    result = run("export", "--target=theirs", "--mood", "brisk", "--depth", "3", "--no-rounded")
    assert result.exit_code == 0, result.stderr
    assert seen["request"].options == TheirOptions(mood="brisk", depth=3, rounded=False)


def test_passes_graphs_and_output_reach_the_api(seen: dict[str, Any]) -> None:
    result = run("export", "-o", "there", "--disable-pass", "a", "--disable-pass", "b", "--dump-graphs", "graphs")
    assert result.exit_code == 0, result.stderr
    request = seen["request"]
    assert (seen["output"], request.disable_pass, request.dump_graphs) == (Path("there"), ("a", "b"), Path("graphs"))


@pytest.mark.parametrize(
    ("option", "maker", "value"),
    [("--checkpoint", "checkpoint_source", "sam3.pt"), ("--module", "factory_source", "pkg.mod:make")],
)
def test_a_named_encoder_is_loaded_and_no_random_weights_are_announced(
    seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch, option: str, maker: str, value: str
) -> None:
    monkeypatch.setattr(sources, maker, lambda given, *_: f"source of {given}")
    monkeypatch.setattr(sources, "encoder_factory", lambda given: given)
    result = run("export", option, value)
    assert result.exit_code == 0, result.stderr
    assert seen["cut"] == f"source of {value}"
    assert "RANDOM" not in result.output


# ---- what is printed


def test_export_says_random_weights_steps_with_times_and_a_summary(seen: dict[str, Any]) -> None:
    result = run("export")
    assert "RANDOM weights" in result.stderr
    for step in ("source", "capture", "passes", "lower to onnx", "verify"):
        assert any(line.startswith(step) and line.rstrip().endswith(" s") for line in result.stderr.splitlines()), step
    assert "out/fusion_encoder.onnx" in result.stdout and "1.3e-06" in result.stdout
    assert "a library prints" not in result.stdout


def test_quiet_prints_nothing(seen: dict[str, Any]) -> None:
    result = run("export", "-q")
    assert (result.exit_code, result.stdout, result.stderr.replace("a library prints\n", "")) == (0, "", "")


def test_verbose_shows_the_pass_records(seen: dict[str, Any]) -> None:
    assert "scores [B, H] used elsewhere" in run("export", "-v").stdout
    assert "canonicalize_attention" not in run("export").stdout


def test_json_is_the_manifest_and_nothing_else(seen: dict[str, Any]) -> None:
    result = run("export", "--json")
    assert Manifest.model_validate_json(result.stdout) == MANIFEST


def test_the_summary_says_when_nothing_was_verified(seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    component = MANIFEST.components[0].model_copy(update={"verification": ()})
    bare = MANIFEST.model_copy(update={"components": (component,), "verified": False, "verified_reason": "switched off"})
    monkeypatch.setattr(exporter, "export_model", lambda *_, **__: bare)
    assert "NOT verified: switched off" in run("export").stdout


def test_the_summary_says_the_form_that_was_built(seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    component = MANIFEST.components[0].model_copy(update={"metadata": {"form": "attention in loops"}})
    built = MANIFEST.model_copy(update={"components": (component,)})
    monkeypatch.setattr(exporter, "export_model", lambda *_, **__: built)
    assert "form of the network  attention in loops" in run("export").stdout


def test_inspect_shows_everything_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sam3x.artifact.artifact.load_any", lambda folder: MANIFEST)
    text = run("inspect", "out").stdout
    for fact in (
        "random weights, seed 0", "ab" * 32, "(batch, tokens, 32)", "scalar", "canonicalize_attention", "11", "softmax_3",
        "scores [B, H] used elsewhere", "dac=True", "1.3e-06", "fusion_encoder.onnx", "cd" * 32, "12.5 s", "1,090 MB",
        "something_new", "a note [in brackets]", "opset 18",
    ):  # fmt: skip
        assert fact in text, fact
    assert "batch 2" in run("inspect", "out", "-v").stdout  # each comparison
    assert Manifest.model_validate_json(run("inspect", "out", "--json").stdout) == MANIFEST


def test_targets() -> None:
    assert "onnx" in run("targets").stdout
    listed = json.loads(run("targets", "--json").stdout)
    assert {"name", "available", "detail", "install"} <= set(listed[0]) and listed[0]["name"] == "onnx"


# ---- other exits


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.VerificationError("[branch] off"), 2, "sam3x: step 4/4 verify: [branch] off.\n"),
        (KeyboardInterrupt(), 130, "sam3x: interrupted.\n"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, 'Install it: pip install "sam3x[onnx]"\n'),
        (ModuleNotFoundError("No module named 'sam3.model'", name="sam3.model"), 2, 'pip install "sam3x[sam3]"\n'),
        (ZeroDivisionError("two\nlines"), 1, "unexpected ZeroDivisionError: two. Run again with -v for the traceback.\n"),
    ],
)
def test_exit_codes(
    seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(exporter, "export_model", fail)
    result = run("export")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.endswith(message) and "Traceback" not in result.stderr
    if code != 130:
        assert "Traceback" in run("export", "-v").stderr


def test_without_torch_one_sentence_says_what_to_install(seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else real(name, *rest))
    result = run("export")
    assert result.exit_code == 2 and 'pip install "sam3x[onnx]"' in result.stderr and seen == {}


@pytest.mark.parametrize(
    "words",
    ["bench out --html", "bench out --markdown", "bench-pipeline out --markdown", "bench-models --model demo --markdown",
     "compatibility -o", "doctor out --html", "fidelity out --markdown"],
)  # fmt: skip
def test_a_page_in_no_folder_is_refused_before_anything_else(words: str, tmp_path: Path) -> None:
    done = run(*words.split(), tmp_path / "none" / "page")
    assert done.exit_code == 2 and "page cannot be written" in " ".join(done.output.split()).replace("- ", "-")
