"""TensorRT's builder in a process of its own: a crash of it is an error of the export, and the program goes on."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

import sam3x
from sam3x.errors import BuilderError, LoweringError
from sam3x.targets.tensorrt import build as trt_build
from sam3x.targets.tensorrt import in_subprocess as subprocess_module
from sam3x.targets.tensorrt.build import serialize
from sam3x.targets.tensorrt.driver import import_torch_tensorrt, named_device
from sam3x.targets.tensorrt.in_subprocess import Crashed, in_subprocess
from sam3x.targets.tensorrt.options import TrtOptions, capability_of
from support.subprocess_work import chatter, double, end, native, refuse
from support.trt import SMALL, captured, lower
from support.upstream import encoder_of


def config_of(clear_flag: Callable[[Any], None] = lambda flag: None) -> Any:
    """As much of TensorRT's ``IBuilderConfig`` as is used."""
    return SimpleNamespace(
        num_compute_capabilities=0, set_compute_capability=lambda capability, index: None, clear_flag=clear_flag
    )


def test_the_result_comes_back_from_one_process_that_stays() -> None:
    assert in_subprocess(double, bytes(2_500_000)) == bytes(5_000_000)
    assert in_subprocess(chatter, "not an answer") == in_subprocess(chatter, "nor this") != os.getpid()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("code", "said"), [(-11, "SIGSEGV"), (-6, "SIGABRT"), (3, "exit code 3")])
def test_a_crash_is_named_and_the_next_one_starts_afresh(code: int, said: str) -> None:
    before = in_subprocess(os.getpid)
    with pytest.raises(Crashed, match=said):
        in_subprocess(end, code)
    assert in_subprocess(os.getpid) != before


def test_an_error_keeps_its_fields_and_the_process() -> None:
    before = in_subprocess(os.getpid)
    with pytest.raises(LoweringError) as caught:
        in_subprocess(refuse)
    assert (caught.value.fact, caught.value.remedy) == ("no such layer", "Take another.")
    with pytest.raises(RuntimeError, match="Unpicklable"):
        in_subprocess(native)
    assert in_subprocess(os.getpid) == before


def test_callers_in_several_threads_wait_for_each_other() -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda n: in_subprocess(double, bytes([n])), range(8))) == [bytes([n]) * 2 for n in range(8)]


def test_a_script_without_a_main_guard_can_export(tmp_path: Path) -> None:
    """And one whose process has threads, and where warnings are errors: nothing is forked, the script runs once."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, threading\nfrom sam3x.targets.tensorrt.in_subprocess import in_subprocess\nprint('once')\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\nassert in_subprocess(os.getpid) != os.getpid()\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "once\n", "")


def test_a_process_that_is_not_wanted_any_more_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess_module, "IDLE", 0.0)
    before = in_subprocess(os.getpid)
    monkeypatch.undo()
    deadline = time.monotonic() + 30
    while subprocess_module._process is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert in_subprocess(os.getpid) != before


# ---- the next form, where the builder crashes on one


@pytest.mark.parametrize("failing", [("loops",), ("loops", "tiles")])
def test_where_the_builder_crashes_the_next_form_is_built_and_said(
    failing: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def build_or_crash(work: Any, *args: Any) -> Any:
        tried.append(args[-1])
        return in_subprocess(end, -11) if args[-1] in failing else in_subprocess(work, *args)

    monkeypatch.setattr(trt_build, "in_subprocess", build_or_crash)
    options = {**SMALL, "attention_memory": "20KB"}
    artifact = sam3x.export(encoder_of(1), target="trt", output=tmp_path / "out", verify="off", **options)
    form = ["loops", "tiles", "products"][len(failing)]
    metadata, (note,) = artifact.manifest.metadata, [note for note in artifact.manifest.notes if "builder" in note]
    assert tried == [*failing, form] and metadata["form"] == trt_build.FORMS[form] and "notes" not in metadata
    assert note.startswith(f"built with {trt_build.FORMS[form]}") and note.count("SIGSEGV") == len(failing)
    assert metadata["tiled_attention_loops"] == 0
    assert metadata["attentions"] > 2 if form == "tiles" else metadata["layers"]["softmax"] == 2


def test_where_it_crashes_on_every_form_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_build, "in_subprocess", lambda work, *args: in_subprocess(end, -11))
    with pytest.raises(BuilderError, match=r"loops.*SIGSEGV.*tiles.*SIGSEGV.*products.*SIGSEGV.*--precision fp16"):
        lower(captured("select"), tmp_path / "x.engine", attention_memory="2KB")
    assert not list(tmp_path.iterdir())


def test_a_crash_on_a_network_without_attention_says_nothing_of_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_build, "in_subprocess", lambda work, *args: in_subprocess(end, -11))
    program = torch.export.export(torch.nn.Linear(4, 4), (torch.ones(2, 4),))
    with pytest.raises(BuilderError, match="SIGSEGV") as caught:
        trt_build.build(dataclasses.replace(captured("select"), program=program), TrtOptions(), "sm89")
    assert "attention" not in str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_only_tf32_lets_tensorrt_round_the_factors_of_products(precision: Literal["fp32", "tf32", "fp16"]) -> None:
    cleared: list[str] = []
    builder = SimpleNamespace(build_serialized_network=lambda network, config: b"plan")
    with named_device(capability_of("sm89")):
        import_torch_tensorrt()
        assert (
            serialize(
                builder, None, config_of(lambda flag: cleared.append(flag.name)), "sm89", TrtOptions(precision=precision), []
            )
            == b"plan"
        )
    assert cleared == ([] if precision == "tf32" else ["TF32"])


@pytest.mark.parametrize(
    ("kind", "log", "said"),
    [
        (
            LoweringError,
            "Error Code 2: Internal Error (Data-dependent shapes are only allowed in the top-level scope)",
            r"Data-dependent.*Fix the tokens \(--tokens 5184\)",
        ),
        (
            BuilderError,
            "Error Code 1: Myelin (MyelinCheckException: tactic.cpp:3402: CHECK(new_stride_order[i1] != 0) failed.)",
            r"own optimizer failed.*tactic.cpp:3402.*--format plan-onnx",
        ),
        (LoweringError, "Error Code 4: Internal API Usage (no such layer)", "builder refused the network: .*no such layer"),
    ],
    ids=["sizes", "an assertion of its own", "anything else"],
)
def test_a_refusal_says_why_and_the_way_out(kind: type[LoweringError], log: str, said: str) -> None:
    builder = SimpleNamespace(build_serialized_network=lambda network, config: None)
    with named_device(capability_of("sm89")), pytest.raises(LoweringError, match=said) as caught:
        import_torch_tensorrt()
        serialize(builder, None, config_of(), "sm89", TrtOptions(), [log])
    assert caught.type is kind
