"""A few of the cases of ``make fuzz`` on every target, and proof that it finds what is wrong."""

from __future__ import annotations

import operator
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.export import ExportedProgram

from fuzz import search
from sam3x.capture import component
from sam3x.passes.attention.canonicalize_attention import CanonicalizeAttentionPass
from sam3x.passes.base import PassResult, graph_modules
from support import differential
from support.counts import BUILDER_FAILED, COUNTS, too_many_failures
from support.differential import Difference, check
from support.strategies import Case, EncoderCase, InputsCase, cases
from support.workers import follow

ci = settings(
    deadline=None,
    derandomize=True,  # the same in every run: what is new is for ``make fuzz`` to find
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
aten = torch.ops.aten


def few(target: str, lowerings: int = 2) -> st.SearchStrategy[Case]:
    """Cases with at most so many ways to lower them."""
    return cases(target).map(lambda case: replace(case, lowerings=case.lowerings[:lowerings]))


@settings(ci, max_examples=2)
@given(few("onnx"))
def test_onnx(case: Case) -> None:
    check(case)


@settings(ci, max_examples=1)
@given(few("pte", lowerings=1))
def test_pte(case: Case) -> None:
    check(case)


# ---- planted: each must be found


def scale_squared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A canonicalizer that takes the square of the scale it found."""
    original = CanonicalizeAttentionPass.call

    def call(self: CanonicalizeAttentionPass, program: ExportedProgram) -> PassResult:
        result = original(self, program)
        for _, module in graph_modules(program):
            for node in module.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
                if node.kwargs.get("scale") is not None:
                    node.kwargs = {**node.kwargs, "scale": node.kwargs["scale"] ** 2}
        return result

    monkeypatch.setattr(CanonicalizeAttentionPass, "call", call)


def in_every_capture(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.fx.GraphModule], None]) -> None:
    original = component.capture_encoder

    def capture(*arguments: Any) -> Any:
        captured = original(*arguments)
        for _, module in graph_modules(captured.program):
            change(module)
            module.recompile()
        return captured

    monkeypatch.setattr(component, "capture_encoder", capture)


def mask_inverted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The padding mask that dac slices keeps what it should hide."""

    def change(module: torch.fx.GraphModule) -> None:
        for node in module.graph.find_nodes(op="call_function", target=aten.slice.Tensor):
            if node.args[0].name == "tgt_key_padding_mask":
                users = list(node.users)
                with module.graph.inserting_after(node):
                    inverted = module.graph.call_function(aten.logical_not.default, (node,))
                inverted.meta = dict(node.meta)
                for user in users:
                    user.replace_input_with(node, inverted)

    in_every_capture(monkeypatch, change)


def half_of_the_batch_baked_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The half that torch.export saw while tracing, at every batch."""

    def change(module: torch.fx.GraphModule) -> None:
        for node in module.graph.find_nodes(op="call_function", target=operator.floordiv):
            if node.args[1] == 2:
                for user in list(node.users):
                    user.args = tuple(3 if argument is node else argument for argument in user.args)

    in_every_capture(monkeypatch, change)


PLANTS = {scale_squared: 44, mask_inverted: 95, half_of_the_batch_baked_in: 62}


@pytest.mark.long
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within two minutes of one core; with these seeds among the first cases."""
    plant(monkeypatch)
    script = search("onnx", 120, PLANTS[plant], shrink=False, keep=False, clock=time.process_time)
    assert script is not None and script.count("\n") < 12, script
    seen = ("Difference: ", "VerificationError: ", "ArtifactError: run: ")  # by the oracle, the export itself, the runtime
    assert "check(Case(" in script and any(name in script for name in seen), script


def test_a_failure_is_told_at_once_and_made_simpler_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case takes thirty seconds and fails: two in the time of the search, two in the minute after it."""
    now, told = [0.0], []

    def check(case: Case) -> None:
        now[0] += 30
        raise Difference("planted")

    monkeypatch.setattr(differential, "check", check)
    script = search("onnx", 50, 1, keep=False, clock=lambda: now[0], tell=lambda **message: told.append(message))
    assert script is not None and script.endswith("EOF\nDifference: planted")
    assert [next(iter(message)) for message in told][:2] == ["trying", "found"]
    assert sum("trying" in message for message in told) <= 4 and sum("found" in message for message in told) == 1


def test_a_process_that_crashes_says_what_it_tried() -> None:
    code = "from support.workers import say; import os, sys; say(counts={'onnx configurations': 3}); print('not JSON'); "
    code += "say(trying='the case'); print('its last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)"
    found = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
    heard: list[dict[str, Any]] = []
    said = follow([sys.executable, "-c", found + code], heard.append)
    assert heard == [{"counts": {"onnx configurations": 3}}]
    assert said == "died of SIGSEGV (rc -11), while it tried\nthe case\nits last words"


def test_a_mask_over_rows_that_only_a_run_counts() -> None:
    """torch's own shape of an attention asked whether dac's half is 1; found by a fuzz."""
    check(
        Case(
            encoder=EncoderCase(num_heads=4, head_dim=8, positions=(False, True, False), styles=("scale_split",) * 2, seed=6),
            spec={
                "pre_norm": "module",
                "dac": "runtime",
                "dac_dim": 1,
                "batch": (1, 8),
                "prompt_length": (3, 12),
                "tokens": 36,
                "inputs": ("tgt", "memory", "tgt_key_padding_mask", "pos", "query_pos"),
                "mask_dtype": "float32",
            },
            lowerings=({"branches": "select", "attention": "ort"},),
            runs=(InputsCase(tokens=36, prompt_length=6),),
        )
    )


def test_a_mask_of_all_pairs_whose_rows_a_flag_counts() -> None:
    """torch compared u with u²/u, the two sizes that one number of rows had; found by ``make fuzz``."""
    names = ("tgt_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "pos", "query_pos")
    spec = {"pre_norm": "per-layer", "dac": True, "dac_dim": 1, "batch": (2, 8), "prompt_length": 8, "tokens": 38}
    check(
        Case(
            encoder=EncoderCase(pre_norm=(True,), styles=("meta", "matmul"), seed=69),
            spec={**spec, "inputs": ("tgt", "memory", *names), "mask_dtype": "float32"},
            lowerings=({"branches": "cond", "attention": "decomposed"}, {"branches": "select"}),
            runs=(InputsCase(batch=7, tokens=38, prompt_length=8, hidden="none"),),
        )
    )


@pytest.mark.long
def test_heads_put_in_order_where_a_flag_counts_the_rows() -> None:
    """torch asked whether a tensor of dac's half is contiguous; found by ``make fuzz``."""
    names = ("tgt_mask", "memory_key_padding_mask", "pos", "query_pos")
    spec = {"pre_norm": "runtime", "dac": "runtime", "dac_dim": 1, "batch": (1, 8), "prompt_length": (1, 12), "tokens": 28}
    check(
        Case(
            encoder=EncoderCase(
                num_heads=2, pre_norm=(True, False), positions=(True, True, False), styles=("einsum",) * 2, seed=66
            ),
            spec={**spec, "inputs": ("tgt", "memory", *names), "mask_dtype": "float32"},
            lowerings=({"branches": "select", "attention": "decomposed"}, {"branches": "cond", "attention": "ort"}),
            runs=(InputsCase(batch=6, tokens=28, prompt_length=8, seed=83),),
        )
    )


@pytest.mark.long
def test_one_head_whose_batch_stands_where_heads_do() -> None:
    """The pass that splits heads for ExecuTorch asked for their number, and fixed the batch; found by ``make fuzz``."""
    names = ("tgt_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "pos", "query_pos")
    spec = {"pre_norm": "module", "dac": True, "dac_dim": 0, "batch": (3, 8), "prompt_length": (1, 12), "tokens": 5}
    check(
        Case(
            encoder=EncoderCase(head_dim=1, dim_feedforward=2, positions=(False, True, False), styles=("meta", "bmm"), seed=90),
            target="pte",
            spec={**spec, "inputs": ("tgt", "memory", *names), "mask_dtype": "bool"},
            lowerings=({"delegate": "xnnpack"},),
            runs=(InputsCase(batch=4, tokens=5, prompt_length=9), InputsCase(batch=8, tokens=5, prompt_length=3)),
        )
    )


@pytest.mark.long
def test_elements_that_are_counted_in_a_fixed_batch() -> None:
    """ONNX has no word for their number, and only the row mask of dac left it in the graph; found by ``make fuzz``."""
    names = ("memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask")
    spec = {"pre_norm": "runtime", "dac": "runtime", "dac_dim": 0, "batch": 4, "prompt_length": 12, "tokens": (1, 40)}
    check(
        Case(
            encoder=EncoderCase(
                num_heads=4, head_dim=5, pre_norm=(False,), positions=(True,) * 3, styles=("bmm",) * 2, shared="linear", seed=85
            ),
            target="openvino",
            spec={**spec, "inputs": ("tgt", "memory", *names), "mask_dtype": "bool"},
            lowerings=({},),
            runs=(InputsCase(batch=4, tokens=16, prompt_length=12, seed=81),),
        )
    )


def test_positions_and_biases_counted_in_whole_numbers() -> None:
    """ONNX has no operator over whole numbers and floats, which torch casts silently; found by a fuzz."""
    check(
        Case(
            encoder=EncoderCase(num_heads=2, styles=("biased_by_head", "rotary")),
            spec={"pre_norm": "module", "dac": False, "dac_dim": 0, "inputs": ("tgt", "memory")},
            lowerings=({},),
        )
    )


def test_autocast_inside_an_attention_must_be_refused() -> None:
    spec = {"pre_norm": "module", "dac": False, "inputs": ("tgt", "memory")}
    before = COUNTS.copy()
    check(Case(encoder=EncoderCase(styles=("meta", "autocast")), spec=spec, ambient="autocast"))
    assert (COUNTS - before)["onnx refusals"] == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("encoder", "spec", "lowering", "other"),
    [
        (  # MyelinCheckException: CHECK(common_bb == cur_call->dds_parent()->parent())
            EncoderCase(num_heads=2, pre_norm=(False,), styles=("temperature", "grouped"), peaked=4.0, seed=75),
            {"pre_norm": "runtime", "dac": True, "dac_dim": 1, "batch": (3, 8), "tokens": (9, 40)},
            {"format": "engine", "branches": "select", "attention_memory": "2KB"},
            {"attention_memory": "256MB"},
        ),
        (  # MyelinCheckException: CHECK(new_stride_order[i1] != new_stride_order[i2])
            EncoderCase(head_dim=5, pre_norm=(False,), positions=(False, True, True), styles=("einsum",) * 2, seed=28),
            {"pre_norm": "module", "dac": False, "dac_dim": 0, "batch": (2, 8), "tokens": (16, 40)},
            {"format": "plan-onnx", "attention_memory": "256MB"},
            {"format": "engine"},
        ),
    ],
    ids=["dds_parent", "stride_order"],
)
def test_what_tensorrts_own_optimizer_fails_on_is_told_as_such(
    encoder: EncoderCase, spec: dict[str, Any], lowering: dict[str, Any], other: dict[str, Any]
) -> None:
    """And another form of it builds, as the sentence says; found by ``make fuzz``. A TensorRT that builds both is as right."""
    spec = {**spec, "prompt_length": (1, 12), "inputs": ("tgt", "memory", "pos"), "mask_dtype": "bool"}
    before = COUNTS.copy()
    for options in (lowering, {**lowering, **other}):
        options = {"compute_capability": "sm89", **options}
        check(Case(encoder=encoder, target="trt", spec=spec, lowerings=(options,), runs=(InputsCase(batch=4),)))
    counted = COUNTS - before
    assert counted["trt configurations"] == 2 and counted["trt refusals"] == 0 and counted[f"trt {BUILDER_FAILED}"] <= 1


def test_a_builder_that_fails_more_often_than_it_did_fails_the_fuzz() -> None:
    counts = {"onnx configurations": 400, "trt configurations": 60, f"trt {BUILDER_FAILED}": 6}
    assert too_many_failures(counts) is None
    said = too_many_failures({**counts, f"trt {BUILDER_FAILED}": 7})
    assert said is not None and "trt: its builder failed on 7 of 60" in said
    assert too_many_failures({"trt configurations": 3, f"trt {BUILDER_FAILED}": 2}) is None


def test_the_script_of_a_failure_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(differential, "check", seen.append)
    case = Case(
        encoder=EncoderCase(num_heads=2, pre_norm=(True, False)),
        spec={"dac": False, "pre_norm": "module", "batch": (1, 8)},
        lowerings=({"branches": "select"},),
        runs=(InputsCase(tokens=7), InputsCase(hidden="all")),
        relation="fixed",
    )
    code = case.script().split("<<EOF\n")[1].removesuffix("EOF")
    exec(code, {})
    assert seen == [case]


def test_the_oracle_sees_a_thousandth() -> None:
    """And NaN on one side alone, another shape, another dtype."""
    right = torch.randn(2, 3)
    differential._near(Case(), "x", right, right, right.double())
    wrong = [right + 1e-3, torch.where(right > right.min(), right, torch.nan), right[:1], right.double()]
    for got in wrong:
        with pytest.raises(Difference):
            differential._near(Case(), "x", got, right, right.double())
