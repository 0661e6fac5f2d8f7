"""A state machine over orders of passes: swapped, left out, the numbers looked at after each change."""

from __future__ import annotations

import functools
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sam3x.capture.capture import capture
from sam3x.capture.program import CapturedProgram, run_program
from sam3x.errors import SpecError, Step
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.passes.pipeline import PassPipeline
from sam3x.spec import make_spec
from sam3x.targets.onnx import attention as onnx_attention
from sam3x.verify.compare import compare, require
from support.counts import COUNTS
from support.strategies import EncoderCase

ENCODERS = {
    "meta": EncoderCase(num_heads=2, pre_norm=(True, False)),
    "matmul": EncoderCase(num_heads=2, styles=("matmul", "keep_mask"), peaked=4.0),
    "rotary": EncoderCase(num_heads=2, styles=("rotary_complex", "biased")),
    "grouped": EncoderCase(num_heads=4, styles=("enable_gqa", "grouped_by_groups")),
}


@functools.cache
def captured(name: str) -> CapturedProgram:
    names = ("tgt", "memory", "tgt_key_padding_mask", "memory_key_padding_mask", "query_pos")
    return capture(ENCODERS[name].build(), make_spec(inputs=names, batch=(1, 8), tokens=(1, 40), prompt_length=(1, 12)))


def passes() -> tuple[Any, ...]:
    """Everything an ONNX export with data flow and small tiles runs, whose result torch itself can still run."""
    return default_pipeline("select").then(*onnx_attention.passes("portable", 2000)).passes


def allowed(order: list[Any]) -> PassPipeline | None:
    try:
        return PassPipeline(tuple(order))
    except SpecError:
        return None


class Orders(RuleBasedStateMachine):
    """Passes swapped and left out, one after another; the numbers are looked at after each change."""

    @initialize(encoder=st.sampled_from(list(ENCODERS)))
    def begin(self, encoder: str) -> None:
        self.program = captured(encoder)
        self.order = list(passes())
        self.pipeline = PassPipeline(tuple(self.order))

    @rule(left=st.integers(0, 9), right=st.integers(0, 9))
    def swap(self, left: int, right: int) -> None:
        order = list(self.order)
        if order:
            left, right = left % len(order), right % len(order)
            order[left], order[right] = order[right], order[left]
        if (pipeline := allowed(order)) is not None:
            self.order, self.pipeline = order, pipeline

    @rule(at=st.integers(0, 9))
    def leave_out(self, at: int) -> None:
        if self.order:
            self.pipeline = self.pipeline.without(self.order[at % len(self.order)].name)
            self.order = list(self.pipeline.passes)

    @invariant()
    def the_numbers_are_the_same(self) -> None:
        if not hasattr(self, "pipeline"):
            return
        result, records = self.pipeline.run(self.program)
        assert [record.name for record in records] == [item.name for item in self.order]
        found = compare(result.samples, lambda x: run_program(result.program, x, result.output_names), self.program.eager)
        require(found, Step.PASSES, str(self.pipeline.names))
        COUNTS["orders of passes"] += 1
        COUNTS["orders comparisons"] += len(found)
