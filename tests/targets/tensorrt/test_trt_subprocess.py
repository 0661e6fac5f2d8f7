"""TensorRT's builder in a process of its own: a crash of it is an error of the export, and the program goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from sam3x.errors import BuilderError, LoweringError
from sam3x.targets.tensorrt.build import serialize
from sam3x.targets.tensorrt.driver import import_torch_tensorrt, named_device
from sam3x.targets.tensorrt.in_subprocess import Crashed, in_subprocess
from sam3x.targets.tensorrt.options import TrtOptions, capability_of


def config_of(clear_flag: Callable[[Any], None] = lambda flag: None) -> Any:
    """As much of TensorRT's ``IBuilderConfig`` as is used."""
    return SimpleNamespace(
        num_compute_capabilities=0, set_compute_capability=lambda capability, index: None, clear_flag=clear_flag
    )


def test_the_result_and_the_log_come_back() -> None:
    log = ["before"]

    def work() -> bytes:
        log.append("from there")
        return bytes(5_000_000)

    assert in_subprocess(work, log) == bytes(5_000_000) and log == ["before", "from there"]
    assert in_subprocess(lambda: None, log) is None


def test_a_crash_is_named() -> None:
    with pytest.raises(Crashed, match="SIGSEGV"):
        in_subprocess(lambda: os.kill(os.getpid(), signal.SIGSEGV), [])  # type: ignore[arg-type,return-value,func-returns-value]
    with pytest.raises(Crashed, match="exit code 3"):
        in_subprocess(lambda: os._exit(3), [])


def test_a_crash_of_the_builder_is_one_sentence() -> None:
    builder = SimpleNamespace(build_serialized_network=lambda network, config: os.kill(os.getpid(), signal.SIGSEGV))
    with (
        named_device(capability_of("sm89")),
        pytest.raises(BuilderError, match=r"builder crashed on the network \(SIGSEGV\).*--attention-memory"),
    ):
        import_torch_tensorrt()
        serialize(builder, None, config_of(), "sm89", TrtOptions(), [])


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
