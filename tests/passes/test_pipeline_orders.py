"""Any order of the passes that their constraints allow, with any of them left out, gives the same numbers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from sam3x.capture.program import run_program
from sam3x.errors import Step
from sam3x.passes.pipeline import PassPipeline
from sam3x.verify.compare import compare, require
from support.orders import Orders, captured, passes


def test_any_order_and_any_choice_of_passes() -> None:
    rules = settings(
        max_examples=1,
        stateful_step_count=3,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Orders, settings=rules)


@pytest.mark.parametrize("name", [item.name for item in passes()])
def test_any_pass_may_be_left_out(name: str) -> None:
    pipeline = PassPipeline(passes()).without(name)
    result, _ = pipeline.run(captured("matmul"))
    found = compare(result.samples, lambda x: run_program(result.program, x, result.output_names), captured("matmul").eager)
    require(found, Step.PASSES, name)
