"""Custom attention operators: registered, rewritten like any other attention, refused where they break their registration."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam3x.passes
from sam3x.errors import SpecError
from sam3x.passes.attention.canonicalize_attention import CanonicalizeAttentionPass
from sam3x.passes.base import count_ops
from support.attention_inputs import B, D, N, S, bnhd, padding, qkv, soft
from support.canonical import DYN, SDPA, Module, capture, check_numbers, check_plain, check_sound, run_pass, sdpa_of


@torch.library.custom_op("sam3x_test::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, hide: Tensor | None = None, scale: float | None = None) -> Tensor:
    """(B, N, H, D) each; ``hide`` (B, 1, 1, S)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    keep = None if hide is None else ~hide
    return nn.functional.scaled_dot_product_attention(q, k, v, keep, scale=scale).transpose(1, 2).contiguous()


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, hide: Tensor | None = None, scale: float | None = None) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@torch.library.custom_op("sam3x_test::flash", mutates_args=())
def flash_op(values: Tensor, keys: Tensor, queries: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(N, B, D) each, and what a kernel would save for its gradient."""
    q, k, v = (x.transpose(0, 1) for x in (queries, keys, values))
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
    return (soft(scores) @ v).transpose(0, 1).contiguous(), scores.logsumexp(-1)


@flash_op.register_fake
def _(values: Tensor, keys: Tensor, queries: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    n, b, _ = queries.shape
    return queries.new_empty(n, b, values.shape[-1]), queries.new_empty(b, n)


@pytest.fixture
def registered() -> Iterator[Callable[..., None]]:
    names: list[str] = []

    def register(name: str, **options: Any) -> None:
        sam3x.passes.register_attention_op(name, **options)
        names.append(name)

    yield register
    for name in names:
        sam3x.passes.unregister_attention_op(name)


def _custom(q: Tensor, k: Tensor, v: Tensor, hide: Tensor) -> Tensor:
    return attention_op(q, k, v, hide[:, None, None], 0.3).view(B, -1, 4 * D) + 1


@pytest.mark.parametrize("names", [{"query": 0, "mask": 3, "scale": 4}, {"query": "q", "mask": "hide", "scale": "scale"}])
def test_registered_operator(registered: Callable[..., None], names: dict[str, Any]) -> None:
    args = (*bnhd(*qkv(heads=4, kv_heads=2)), padding())
    program = capture(Module(_custom), args)
    assert not CanonicalizeAttentionPass().call(program).modified
    registered("sam3x_test::attention", mask_kind="bool_hide", layout="BNHD", **names)
    result = CanonicalizeAttentionPass().call(program)
    assert result.rewrites == 1 and count_ops(program)[SDPA] == 1
    assert "sam3x_test.attention.default" not in count_ops(program)
    assert sdpa_of(program).kwargs["scale"] == 0.3
    check_sound(program)
    check_plain(program)
    check_numbers(Module(_custom), program, args)
    assert not CanonicalizeAttentionPass().call(program).modified


def test_registered_operator_with_two_results(registered: Callable[..., None]) -> None:
    registered("sam3x_test::flash", query=2, key=1, value=0, mask="bias", mask_kind="float", layout="NBD")
    module = Module(lambda q, k, v, bias: flash_op(v, k, q, bias)[0])
    args = (torch.randn(N, B, D), torch.randn(S, B, D), torch.randn(S, B, D), torch.randn(B, N, S))
    run_pass(module, args, ({0: DYN, 1: DYN}, {0: DYN, 1: DYN}, {0: DYN, 1: DYN}, {0: DYN, 1: DYN, 2: DYN}))
    both = Module(lambda q, k, v, bias: flash_op(v, k, q, bias))
    result = CanonicalizeAttentionPass().call(capture(both, args))
    assert not result.modified and "more than the first result" in result.match_failures[0].reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layout": "NBD"}, "registered layout"),
        ({"layout": "BHND", "mask": 3, "mask_kind": "float"}, "multiple|registered as|result"),
        ({"layout": "BNHD", "mask": 3, "mask_kind": "float"}, "registered as float"),
        ({"layout": "BNHD", "scale": 3}, "scale of the operator"),
    ],
)
def test_operator_that_breaks_its_registration(registered: Callable[..., None], options: dict[str, Any], reason: str) -> None:
    registered("sam3x_test::attention", **options)
    program = capture(Module(_custom), (*bnhd(*qkv(heads=4, kv_heads=2)), padding()))
    before = str(program.graph)
    result = CanonicalizeAttentionPass().call(program)
    assert not result.modified and str(program.graph) == before
    assert re.search(reason, result.match_failures[0].reason)


@pytest.mark.parametrize(
    ("name", "options", "fact"),
    [
        ("nowhere::attention", {}, "no such operator"),
        ("attention", {}, "no such operator"),
        ("sam3x_test::attention", {"query": 9}, "query=9"),
        ("sam3x_test::attention", {"value": "vv"}, "value='vv'"),
        ("sam3x_test::attention", {"mask": -1}, "mask=-1"),
        ("sam3x_test::attention", {"scale": "s"}, "scale='s'"),
        ("sam3x_test::attention", {"scale": math.inf}, "not finite"),
        ("sam3x_test::attention", {"key": 0}, "same argument"),
        ("sam3x_test::attention", {"mask_kind": "bool"}, "mask_kind"),
        ("sam3x_test::attention", {"layout": "BHDD"}, "layout"),
        ("sam3x_test::attention", {"layout": "BH"}, "layout"),
    ],
)
def test_bad_registration(name: str, options: dict[str, Any], fact: str) -> None:
    with pytest.raises(SpecError, match="register_attention_op") as caught:
        sam3x.passes.register_attention_op(name, **options)
    assert fact in str(caught.value)


def test_registering_twice(registered: Callable[..., None]) -> None:
    registered("sam3x_test::attention")
    sam3x.passes.register_attention_op("sam3x_test::attention")
    with pytest.raises(SpecError, match="unregister_attention_op"):
        sam3x.passes.register_attention_op("sam3x_test::attention", layout="BNHD")


def test_unregistering_the_unknown() -> None:
    with pytest.raises(SpecError, match="not registered"):
        sam3x.passes.unregister_attention_op("sam3x_test::attention")
