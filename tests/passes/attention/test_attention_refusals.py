"""What is no attention, or not proved to be, stays as it is, with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam3x.passes.attention.canonicalize_attention import CanonicalizeAttentionPass
from support.attention_inputs import ROOT, B, H, N, S, qkv, soft
from support.canonical import Module, capture


def _refusals() -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]]:
    q, k, v = qkv(n=S)
    gate = torch.rand(B, H, S, S)

    def scores_elsewhere(q, k, v):
        scores = q @ k.mT / ROOT
        return soft(scores) @ v + scores.mean()

    def probabilities_elsewhere(q, k, v):
        weights = soft(q @ k.mT / ROOT)
        return weights @ v + weights.mean()

    def numbers_added(q, k, v):
        return soft(q @ k.mT + 1.0) @ v

    return {
        "soft_cap": (lambda q, k, v: soft(50 * torch.tanh(q @ k.mT / 50)) @ v, (q, k, v), "tanh"),
        "scores_elsewhere": (scores_elsewhere, (q, k, v), "used elsewhere"),
        "probabilities_elsewhere": (probabilities_elsewhere, (q, k, v), "used 2 times"),
        "tensor_scale": (lambda q, k, v, s: soft(q @ k.mT * s) @ v, (q, k, v, torch.tensor(0.5)), "is a tensor"),
        "wrong_softmax_dim": (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, (q, k, v), "not the softmax's"),
        "softmax_over_heads": (lambda q, k, v: (q @ k.mT).softmax(1) @ v, (q, k, v), "over dimension 1"),
        "transposed_probabilities": (lambda q, k, v: soft(q @ k.mT).mT @ v, (q, k, v), "not the softmax's"),
        "value_on_the_left": (lambda q, k, v: v.mT @ soft(q @ k.mT), (q, k, v), "not the softmax's"),
        "gated": (lambda q, k, v, g: (soft(q @ k.mT) * g) @ v, (q, k, v, gate), "mul"),
        "small_fill": (lambda q, k, v, g: soft((q @ k.mT).masked_fill(g > 0.5, -5.0)) @ v, (q, k, v, gate), "does not mask"),
        "positive_fill": (lambda q, k, v, g: soft((q @ k.mT).masked_fill(g > 0.5, 1e9)) @ v, (q, k, v, gate), "does not mask"),
        "fill_by_tensor": (lambda q, k, v, g: soft(torch.where(g > 0.5, q @ k.mT, g)) @ v, (q, k, v, gate), "not a constant"),
        "number_added": (numbers_added, (q, k, v), "number is added"),
        "mask_larger": (lambda q, k, v, g: soft((q @ k.mT)[:1] + g) @ v, (q, k, v, gate), "slice"),
        "heads_mixed": (
            lambda q, k, v: soft((q @ k.mT).reshape(B, H * S, S)).reshape(B, S, H, S).transpose(1, 2) @ v,
            (q, k, v),
            "mixes dimensions",
        ),
        "squared": (lambda q, k, v: soft((q @ k.mT) ** 2) @ v, (q, k, v), "pow"),
    }


REFUSALS = _refusals()


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_leaves_the_graph_and_says_why(name: str) -> None:
    function, args, reason = REFUSALS[name]
    program = capture(Module(function), args)
    before = str(program.graph)
    result = CanonicalizeAttentionPass().call(program)
    assert not result.modified and not result.rewrites and str(program.graph) == before
    assert [reason in failure.reason for failure in result.match_failures] == [True], result.match_failures


def test_weights_that_are_returned_are_refused() -> None:
    def function(q, k, v):
        weights = soft(q @ k.mT)
        return weights @ v, weights

    result = CanonicalizeAttentionPass().call(capture(Module(function), qkv()))
    assert not result.modified and "used 2 times" in result.match_failures[0].reason


def test_learnt_scale_is_refused() -> None:
    class Learnt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return soft(q @ k.mT * self.scale) @ v

    result = CanonicalizeAttentionPass().call(capture(Learnt(), qkv()))
    assert not result.modified and "is a tensor" in result.match_failures[0].reason


@pytest.mark.parametrize("function", [lambda x: soft(x), lambda x: soft(x * 2) + 1, lambda x: soft(x.mT)])
def test_other_softmaxes_are_not_mentioned(function: Callable[..., Tensor]) -> None:
    result = CanonicalizeAttentionPass().call(capture(Module(function), (torch.randn(B, N, S),)))
    assert not result.modified and not result.match_failures


def test_plain_sdpa_stays() -> None:
    program = capture(Module(nn.functional.scaled_dot_product_attention), qkv())
    assert not CanonicalizeAttentionPass().call(program).modified


def test_reason_in_a_branch_names_it() -> None:
    def function(flag, q, k, v):
        yes = lambda q, k, v: (soft(torch.tanh(q @ k.mT)) @ v,)  # noqa: E731
        return torch.ops.higher_order.cond(flag, yes, lambda q, k, v: (q + 1,), (q, k, v))[0]

    program = capture(Module(function), (torch.tensor(True), *qkv()))
    (failure,) = CanonicalizeAttentionPass().call(program).match_failures
    assert failure.node.startswith("true_graph_0.") and "tanh" in failure.reason
