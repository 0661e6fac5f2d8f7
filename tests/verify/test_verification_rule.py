"""When an output counts as equal (decision 0004)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam3x.capture.program import CapturedProgram, Sample
from sam3x.errors import Step, VerificationError
from sam3x.targets.tensorrt.check import drift
from sam3x.verify.compare import check_pass, compare, require
from sam3x.verify.record import VerificationRecord


@pytest.mark.parametrize(("off", "passed"), [(1e-5, True), (1e-4, True), (1e-3, False)])
def test_eager_that_is_near_float64_by_chance_is_measured_again(off: float, passed: bool) -> None:
    """A thousand times one is exact in float32, but not a thousand times its neighbours, which are 1.2e-4 away."""

    def eager(inputs: Any) -> dict[str, Tensor]:
        return {"output": inputs["tgt"] * 1000}

    sample = Sample(branch="fixed", case="ones", inputs={"tgt": torch.ones(2, 3)})
    (record,) = compare([sample], lambda inputs: {"output": eager(inputs)["output"] + off}, eager)
    assert record.passed is passed


class Scaled(nn.Module):
    """What a component gives: values in the thousands; ``off`` is a millionth of them."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self.off = off

    def forward(self, tgt: Tensor) -> Tensor:
        return tgt * 1024 + self.off


@pytest.mark.parametrize("scaled", [True, False])
def test_a_graph_is_judged_by_the_rule_of_its_artifact(scaled: bool) -> None:
    """After each pass, and where an engine is proven by it: of a component by its largest value."""
    sample = Sample(branch="fixed", case="ones", inputs={"tgt": torch.rand(2, 3) + 1})
    program = torch.export.export(Scaled(1e-2), (sample.inputs["tgt"],), strict=False)
    captured = CapturedProgram(
        program=program,
        input_names=("tgt",),
        output_names=("output",),
        dim_names={},
        samples=(sample,),
        eager=lambda inputs: {"output": Scaled(0.0)(inputs["tgt"])},
        scaled=scaled,
    )
    judges: list[Callable[[], Any]] = [
        lambda: check_pass(captured, captured, "some_pass", ()),
        lambda: drift(captured, "fp32"),
    ]
    for judge in judges:
        with contextlib.nullcontext() if scaled else pytest.raises(VerificationError):
            judge()


def test_the_inputs_that_are_moved_are_copies() -> None:
    given = torch.ones(2, 3)
    sample = Sample(branch="fixed", case="ones", inputs={"tgt": given})
    compare([sample], lambda inputs: {"output": inputs["tgt"] + 1}, lambda inputs: {"output": inputs["tgt"] * 1})
    assert torch.equal(given, torch.ones(2, 3))


def hidden(*places: tuple[int, int]) -> Tensor:
    """(2, 3) of ones, NaN at ``places``."""
    value = torch.ones(2, 3)
    for place in places:
        value[place] = float("nan")
    return value


@pytest.mark.parametrize(
    ("in_eager", "in_artifact", "said"),
    [
        ([(1, 0), (1, 1)], [], "2 undefined values (NaN) in eager itself, the first at [1, 0]"),
        ([], [(0, 2)], "1 undefined values (NaN) in the artifact, the first at [0, 2]"),
        ([(1, 0)], [(0, 2)], "1 undefined values (NaN) in the artifact, the first at [0, 2]"),
    ],
)
def test_a_failure_says_what_is_undefined_where_and_in_whom(in_eager: list, in_artifact: list, said: str) -> None:
    sample = Sample(branch="fixed", case="ones", inputs={"tgt": torch.ones(2, 3)})
    got, want = hidden(*in_artifact), hidden(*in_eager)
    records = compare([sample], lambda inputs: {"output": got}, lambda inputs: {"output": want.to(inputs["tgt"].dtype)})
    with pytest.raises(VerificationError) as failed:
        require(records, Step.VERIFY, "onnx")
    assert said in str(failed.value)


def test_a_rounded_reference_that_overflows_allows_nothing() -> None:
    sample = Sample(branch="fixed", case="ones", inputs={"tgt": torch.ones(2, 3)})
    overflowed = {"output": hidden((0, 0))}
    (record,) = compare(
        [sample],
        lambda inputs: {"output": inputs["tgt"] + 1},
        lambda inputs: {"output": inputs["tgt"]},
        rounded=lambda inputs: overflowed,
    )
    assert not record.passed and record.allowed < 1e-3


def only_float32(inputs: Any) -> dict[str, Tensor]:
    """A thousand times the input, whose last bits are 1.2e-4."""
    if inputs["tgt"].dtype is torch.float64:
        raise RuntimeError("expected Float")
    return {"output": inputs["tgt"] * 1000}


def root_by_bits(inputs: Any) -> dict[str, Tensor]:
    """The inverse square root by float32's bits, which are not those of float64."""
    x = inputs["tgt"]
    return {"output": (0x5F3759DF - (x.view(torch.int32) >> 1)).view(x.dtype)[..., : x.shape[-1]]}


@pytest.mark.parametrize(("off", "passed"), [(1e-5, True), (3e-4, True), (1e-2, False)])
def test_without_float64_an_output_may_be_as_far_as_last_bits_move_float32(off: float, passed: bool) -> None:
    sample = Sample(branch="fixed", case="ones", inputs={"tgt": torch.ones(2, 3)})
    (record,) = compare([sample], lambda inputs: {"output": only_float32(inputs)["output"] + off}, only_float32)
    assert record.passed is passed and record.float32_alone == "RuntimeError: expected Float"


@pytest.mark.parametrize(("off", "passed"), [(0.0, True), (1e-2, False)])
def test_float64_that_computes_something_else_excuses_nothing(off: float, passed: bool) -> None:
    sample = Sample(branch="fixed", case="ones", inputs={"tgt": torch.rand(2, 4) + 1})
    (record,) = compare([sample], lambda inputs: {"output": root_by_bits(inputs)["output"] + off}, root_by_bits)
    assert record.passed is passed and record.float32_alone


def test_undefined_float64_excuses_nothing() -> None:
    def eager(inputs: Any) -> dict[str, Tensor]:
        undefined = inputs["tgt"].dtype is torch.float64
        return {"output": inputs["tgt"] * (float("nan") if undefined else 1)}

    sample = Sample(branch="fixed", case="ones", inputs={"tgt": torch.ones(2, 3)})
    (record,) = compare([sample], lambda inputs: {"output": inputs["tgt"] + 1}, eager)
    assert not record.passed and record.from_float64 is None


def test_float64_of_another_shape_is_no_reference() -> None:
    def eager(inputs: Any) -> dict[str, Tensor]:
        return {"output": inputs["tgt"].view(torch.int32).sum(0).float()}

    sample = Sample(branch="fixed", case="ones", inputs={"tgt": torch.ones(2, 3)})
    (record,) = compare([sample], eager, eager)
    assert record.passed and record.float32_alone == "its shape is (6,) there"


def test_a_failure_of_the_root_mean_square_says_so() -> None:
    numbers: Any = {"max_abs": 1.8e-3, "max_rel": 2e-3, "allowed": 5.7e-3, "rms_rel": 2.5e-3, "eager_rms_rel": 7.9e-4}
    record = VerificationRecord(branch="fixed", case="1 prompt", output="pred_boxes", passed=False, **numbers)
    with pytest.raises(
        VerificationError, match=r"2\.5e-03 of its size from eager in the root mean square, allowed 2\.4e-03, 3 times"
    ):
        require([record], Step.VERIFY, "pte decoder")
