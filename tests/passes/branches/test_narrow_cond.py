"""What both branches do alike stands once, outside; what differs stays inside; the numbers are the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, relu, scaled_dot_product_attention

import sam3x.capture.capture
from sam3x.capture.samples import Sizes, samples_for
from sam3x.passes.base import graph_modules
from sam3x.passes.branches.if_convert import IfConvertPass
from sam3x.passes.branches.narrow_cond import NarrowCondPass
from sam3x.passes.pipeline import PassPipeline
from sam3x.spec import make_spec
from support.cond_programs import (
    COND,
    DYN,
    LAYER_NORM,
    LINEAR,
    SDPA,
    Program,
    capture,
    check_numbers,
    check_sound,
    cond,
    evaluate,
    ops,
    private,
)
from support.upstream import encoder_of

G = torch.Generator().manual_seed(5)
X, FLAG, OTHER = torch.randn(6, 3, 8, generator=G), torch.tensor(True), torch.tensor(False)
A, B, C, N = (torch.randn(*shape, generator=G) for shape in ((8, 8), (8, 8), (8, 8), (8,)))


def norm(x: Tensor, n: Tensor) -> Tensor:
    return layer_norm(x, [8], n)


def mlp(x: Tensor, a: Tensor, b: Tensor, act: Callable[[Tensor], Tensor] = relu) -> Tensor:
    return x + linear(act(linear(x, a)), b)


def moved_norm(x: Tensor, f: Tensor, a: Tensor, b: Tensor, c: Tensor, n: Tensor) -> Tensor:
    pre = lambda x, a, b, n: x + linear(relu(linear(norm(x, n), a)), b)  # noqa: E731
    return cond(f, pre, lambda x, a, b, n: norm(mlp(x, a, b), n), x, a, b, n)


def activation(x: Tensor, f: Tensor, a: Tensor, b: Tensor, c: Tensor, n: Tensor) -> Tensor:
    return cond(f, lambda x, a, b: mlp(x, a, b), lambda x, a, b: mlp(x, a, b, gelu), x, a, b)


def swapped(x: Tensor, f: Tensor, a: Tensor, b: Tensor, c: Tensor, n: Tensor) -> Tensor:
    true = lambda x, a, b: linear(x.sin() + x.cos(), a) + x  # noqa: E731
    return cond(f, true, lambda x, a, b: x + linear(x.cos() + x.sin(), a), x, a, b)


def twice(x: Tensor, f: Tensor, a: Tensor, b: Tensor, c: Tensor, n: Tensor) -> Tensor:
    true = lambda x, a, n: linear(norm(linear(x, a), n), a)  # noqa: E731
    return cond(f, true, lambda x, a, n: linear(linear(x, a).relu(), a), x, a, n)


def own_products(x: Tensor, f: Tensor, a: Tensor, b: Tensor, c: Tensor, n: Tensor) -> Tensor:
    """``b`` is one branch's alone, between two products of both."""
    true = lambda x, a, b, c: linear(linear(linear(x, a), b), c)  # noqa: E731
    return cond(f, true, lambda x, a, b, c: linear(linear(x, a).relu(), c), x, a, b, c)


def attention(x: Tensor, f: Tensor, a: Tensor, b: Tensor, c: Tensor, n: Tensor) -> Tensor:
    def run(y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return scaled_dot_product_attention(linear(y, a), linear(y, b), linear(y, c))

    return cond(
        f, lambda x, a, b, c, n: x + run(norm(x, n), a, b, c), lambda x, a, b, c, n: norm(x + run(x, a, b, c), n), x, a, b, c, n
    )


def three_ways(x: Tensor, f: Tensor, a: Tensor, b: Tensor, c: Tensor, n: Tensor) -> Tensor:
    g = x.sum() > 0
    inner = lambda x, g, a, b, n: cond(  # noqa: E731
        g, lambda x, a, b, n: mlp(norm(x, n), a, b), lambda x, a, b, n: mlp(x, a, b, gelu), x, a, b, n
    )
    return cond(f, inner, lambda x, g, a, b, n: norm(mlp(x, a, b), n), x, g, a, b, n)


def halving(x: Tensor, f: Tensor, a: Tensor, b: Tensor, c: Tensor, n: Tensor) -> Tensor:
    """One branch works on the first half only, as dac does."""

    def half(x: Tensor, a: Tensor, b: Tensor, n: Tensor) -> Tensor:
        h = x.shape[0] // 2
        return linear(torch.cat((x[:h] + linear(norm(x[:h], n), a), x[h:])), b)

    return cond(f, half, lambda x, a, b, n: linear(x + linear(norm(x, n), a), b), x, a, b, n)


def uneven(x: Tensor, f: Tensor, a: Tensor, b: Tensor, c: Tensor, n: Tensor) -> Tensor:
    """Sizes that differ without one being the head of the other."""
    true = lambda x, a: linear(x[1:3], a).sum(0)  # noqa: E731
    return cond(f, true, lambda x, a: linear(x.relu(), a).sum(0), x, a)


CASES: dict[str, tuple[Callable[..., Any], dict[str, int]]] = {
    "moved norm": (moved_norm, {LINEAR: 2, COND: 2, LAYER_NORM: 2}),
    "activation": (activation, {LINEAR: 2, COND: 1}),
    "swapped": (swapped, {LINEAR: 1, COND: 0}),
    "shared weight": (twice, {LINEAR: 2, COND: 1}),
    "own products": (own_products, {LINEAR: 3, COND: 1}),
    "attention": (attention, {LINEAR: 3, SDPA: 1, COND: 2}),
    "three ways": (three_ways, {LINEAR: 2}),
    "halving": (halving, {LINEAR: 2, LAYER_NORM: 1, COND: 1}),
    "uneven": (uneven, {LINEAR: 1, COND: 1}),
}


def program_of(function: Callable[..., Any]) -> torch.export.ExportedProgram:
    return capture(Program(function, a=A, b=B, c=C, n=N), (X, FLAG), {0: {0: DYN}})


@pytest.mark.parametrize("name", list(CASES))
def test_products_stand_once(name: str) -> None:
    function, counts = CASES[name]
    program = program_of(function)
    before = private(program)
    result = NarrowCondPass().call(program)
    assert result.modified and result.rewrites >= 1, result.match_failures
    assert {op: ops(program, op) for op in counts} == counts
    check_sound(program)
    for batch in (4, 6, 10):
        check_numbers(before, program, (torch.randn(batch, 3, 8), FLAG), exact=True)
    again = NarrowCondPass().call(program)
    assert not again.modified and not again.rewrites


def test_the_rest_of_a_narrowed_program_converts() -> None:
    for name in ("moved norm", "halving", "three ways"):
        program = program_of(CASES[name][0])
        before = private(program)
        NarrowCondPass().call(program)
        selected = private(program)
        assert not IfConvertPass().call(selected).match_failures and ops(selected, COND) == 0
        check_sound(selected)
        check_numbers(before, selected, (X, FLAG), exact=False)


def _random(x: Tensor, a: Tensor) -> Tensor:
    return linear(x + torch.rand_like(x), a)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "nothing in common": (
        lambda x, f, a, b, c, n: cond(f, lambda x, a: linear(x, a), lambda x, a: x * 2, x, a),
        "in common",
    ),
    "other weights": (
        lambda x, f, a, b, c, n: cond(f, lambda x, a, b: linear(x, a), lambda x, a, b: linear(x, b), x, a, b),
        "same weights",
    ),
    "random": (lambda x, f, a, b, c, n: cond(f, _random, lambda x, a: linear(x, a), x, a), "random"),
    "run twice": (
        lambda x, f, a, b, c, n: cond(
            f,
            lambda x, a, b, c: (lambda y: linear(linear(y.relu(), a) * y, c))(linear(x, b)),
            lambda x, a, b, c: linear(linear(x, a) + 1, c),
            x, a, b, c,
        ),
        "twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_refused_says_why_and_stays(name: str) -> None:
    function, reason = REFUSED[name]
    program = program_of(function)
    text = str(program.graph)
    result = NarrowCondPass().call(program)
    assert not result.modified and str(program.graph) == text
    assert any(reason in item.reason for item in result.match_failures), result.match_failures
    check_sound(program)


def test_what_is_narrow_already_is_no_near_miss() -> None:
    program = program_of(lambda x, f, a, b, c, n: cond(f, lambda x: x.relu() + 1, lambda x: x.tanh() + 1, x))
    result = NarrowCondPass().call(program)
    assert not result.modified and not result.match_failures


def wide_capture() -> Any:
    """SAM3's layer in the form of one with its own forward: whole in every branch."""
    encoder = encoder_of(1)
    layer: nn.Module = encoder.layers[0]

    class Own(type(layer)):  # type: ignore[misc]
        def forward(self, tgt: Tensor, memory: Tensor, **kwargs: Any) -> Tensor:
            return super().forward(tgt, memory, **kwargs)

    layer.__class__ = Own
    old = sam3x.fusion.encoder.is_stock
    sam3x.fusion.encoder.is_stock = lambda *_: False
    try:
        return sam3x.capture.capture.capture(encoder, make_spec())
    finally:
        sam3x.fusion.encoder.is_stock = old


@pytest.mark.long
def test_sam3s_layer_in_the_wide_form() -> None:
    captured = wide_capture()
    assert (ops(captured.program, LINEAR), ops(captured.program, SDPA)) == (36, 8)
    after, records = PassPipeline((NarrowCondPass(),)).run(captured)
    program = after.program
    assert records[0].modified and not records[0].match_failures
    assert (ops(program, LINEAR), ops(program, SDPA)) == (9, 2)
    assert ops(program, LAYER_NORM) == 6 and ops(program, COND) <= 7
    inside = [module for prefix, module in graph_modules(program) if prefix]
    assert not any(str(node.target) in (LINEAR, SDPA) for module in inside for node in module.graph.nodes)
    check_sound(program)
    selected = private(program)
    assert not IfConvertPass().call(selected).match_failures and ops(selected, COND) == 0
    for batch in (1, 4):
        sizes = [Sizes(batch=batch, tokens=20, prompt_length=4)]
        for sample in samples_for(captured.input_names, ("dac", "pre_norm"), make_spec(), 32, 1, sizes):
            old = evaluate(captured.program, sample.inputs)[0]
            assert torch.equal(old, evaluate(program, sample.inputs)[0]), (batch, sample.branch)
            assert (old - evaluate(selected, sample.inputs)[0]).abs().max() <= 2e-5
    assert not NarrowCondPass().call(program).modified


def test_a_wrong_rewrite_is_caught() -> None:
    program = program_of(moved_norm)
    before = private(program)
    NarrowCondPass().call(program)
    node = next(n for n in program.graph.nodes if n.target is torch.ops.higher_order.cond)
    node.args = (node.args[0], node.args[2], node.args[1], node.args[3])
    program.graph_module.recompile()
    with pytest.raises(AssertionError):
        check_numbers(before, program, (X, FLAG), exact=True)
