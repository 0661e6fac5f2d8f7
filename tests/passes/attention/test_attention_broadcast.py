"""Masks and biases of every shape that eager broadcasts, and masks that are added as the lowest float."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sam3x.passes.attention.canonicalize_attention import CanonicalizeAttentionPass
from sam3x.passes.attention.decompose_attention import DecomposeAttentionPass
from sam3x.passes.attention.fuse_multi_head_attention import FuseMultiHeadAttentionPass
from sam3x.passes.attention.legalize_attention_for_pte import LegalizeAttentionForPtePass
from sam3x.passes.attention.legalize_attention_for_trt import LegalizeAttentionForTrtPass
from sam3x.passes.attention.simplify_attention_masks import SimplifyAttentionMasksPass
from sam3x.passes.base import Pass, count_ops
from support.attention_inputs import ROOT, B, H, N, S, qkv, soft
from support.canonical import DYN, SDPA, Module, capture, check_numbers, check_sound, evaluate, run_pass, sdpa_of

SHAPES = [(), (1,), (S,), (1, S), (N, 1), (N, S), (H, 1, 1), (H, N, S), (B, 1, 1, S), (1, H, N, 1), (B, H, N, S)]
LOW = torch.finfo(torch.float32).min

FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda scores, bias: scores + bias,
    "added_to_it": lambda scores, bias: bias + scores,
    "subtracted": lambda scores, bias: scores - 2 * bias,
    "filled": lambda scores, bias: scores.masked_fill(bias > 0.7, -torch.inf),
    "filled_low": lambda scores, bias: scores.masked_fill(bias > 0.7, LOW),
    "kept": lambda scores, bias: torch.where(bias < 0.7, scores, -1e9),
    "low_added": lambda scores, bias: scores + (bias > 0.7).to(scores.dtype) * LOW,
    "low_unless_kept": lambda scores, bias: scores + (1.0 - (bias < 0.7).to(scores.dtype)) * LOW,
    "low_where": lambda scores, bias: scores + torch.where(bias > 0.7, LOW, 0.0),
    "both": lambda scores, bias: (scores + bias).masked_fill(bias > 0.7, LOW),
}


def attention(form: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    return Module(lambda q, k, v, bias: soft(form(q @ k.mT / ROOT, bias)) @ v)


def bias_of(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) if math.prod(shape) > 1 else torch.full(shape, 0.3)


# each shape in two forms, each form at two shapes
PAIRS = [(form, SHAPES[(step * at + 3 * step) % len(SHAPES)]) for step in (1, 4) for at, form in enumerate(FORMS)]


@pytest.mark.parametrize(("form", "shape"), [("added", (S,)), *PAIRS], ids=str)
def test_a_bias_of_any_shape_that_eager_broadcasts(form: str, shape: tuple[int, ...]) -> None:
    run_pass(attention(FORMS[form]), (*qkv(), bias_of(shape)))


def test_a_bias_of_one_dimension_that_counts_keys() -> None:
    module = Module(lambda q, k, v: soft(q @ k.mT / ROOT + torch.arange(k.shape[2]) * 0.01) @ v)
    run_pass(module, qkv(), ({2: DYN}, {2: DYN}, {2: DYN}))


def test_a_bias_of_one_dimension_in_baddbmm() -> None:
    flat = [x.flatten(0, 1) for x in qkv()]
    run_pass(Module(lambda q, k, v, bias: soft(torch.baddbmm(bias, q, k.mT, alpha=0.3)) @ v), (*flat, torch.rand(S)))


LOWERINGS: dict[str, tuple[Pass, ...]] = {
    "decomposed": (DecomposeAttentionPass(),),
    "pte": (LegalizeAttentionForPtePass(),),
    "trt": (LegalizeAttentionForTrtPass(1), DecomposeAttentionPass()),
    "ort": (SimplifyAttentionMasksPass(), FuseMultiHeadAttentionPass(1)),
}


def three_biases(q: Tensor, k: Tensor, v: Tensor, *biases: Tensor) -> Tensor:
    forms = (FORMS["added"], FORMS["filled"], FORMS["low_added"])
    return sum(soft(form(q @ k.mT / ROOT, bias)) @ v for form, bias in zip(forms, biases, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "shapes", [((S,), (N, 1), (S,)), ((), (H, N, S), (H, 1, 1)), ((N, 1), (S,), (B, 1, 1, S))], ids=("keys", "numbers", "rows")
)
def test_every_lowering_takes_what_eager_broadcasts(shapes: tuple[tuple[int, ...], ...]) -> None:
    module, args = Module(three_biases), (*qkv(), *map(bias_of, shapes))
    captured = capture(module, args)
    for passes in LOWERINGS.values():
        program = copy.deepcopy(captured)
        for item in (CanonicalizeAttentionPass(), *passes):
            item.call(program)
        assert count_ops(program).get(SDPA, 0) == 0
        program.graph_module.recompile()
        check_sound(program)
        check_numbers(module, program, args)


# --- rows that the lowest float hides as a whole: the average of the values, in any precision


@pytest.mark.parametrize("form", ["filled_low", "kept", "low_added", "low_unless_kept", "low_where"])
def test_a_row_that_the_lowest_float_hides_is_the_average(form: str) -> None:
    args = (*(10 * x for x in qkv()), torch.cat([torch.zeros(B - 1, 1, 1, S), torch.ones(1, 1, 1, S)]))
    program, _ = run_pass(attention(FORMS[form]), args)
    assert sdpa_of(program).args[3].meta["val"].dtype is torch.bool
    v = args[2]
    average = v[-1:].mean(-2, keepdim=True).expand(1, H, N, -1)
    torch.testing.assert_close(evaluate(program, args)[-1:], average, atol=1e-5, rtol=0)


def test_what_is_added_and_does_not_hide_alone_is_a_bias() -> None:
    """-1e9 leaves the rest of a score, and two of the lowest make -inf: added as they are."""
    once = Module(lambda q, k, v, bias: soft(q @ k.mT + (bias > 0.7).float() * -1e9) @ v)
    twice = Module(lambda q, k, v, bias: soft(q @ k.mT + (bias > 0.7).float() * LOW + (bias > 0.9).float() * LOW) @ v)
    for module in (once, twice):
        program, _ = run_pass(module, (*qkv(), bias_of((B, 1, 1, S))))
        assert sdpa_of(program).args[3].meta["val"].is_floating_point()


@pytest.mark.parametrize("grouped", [1, 2])
def test_grouped_queries_are_repeated_by_a_reshape(grouped: int) -> None:
    """ExecuTorch drops clones, after which a view of an expanded tensor is refused."""
    q, k, v = qkv(heads=4, kv_heads=grouped)
    module = Module(lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    program, _ = run_pass(module, (q, k, v), ({2: DYN}, {2: DYN}, {2: DYN}))
    assert not program.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)
