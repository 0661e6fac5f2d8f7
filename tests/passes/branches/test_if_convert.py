"""Conditionals become ``where``; a conditional number of rows becomes a mask that is right at every even batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

import sam3x.capture.capture
from sam3x.capture.samples import Sizes, samples_for
from sam3x.passes.base import graph_modules
from sam3x.passes.branches.if_convert import IfConvertPass
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.spec import make_spec
from support.cond_programs import (
    COND,
    DYN,
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
from support.cond_trees import FLAG, OTHER, X, run_tree, trees
from support.strategies import EncoderCase, InputsCase
from support.upstream import assert_equal_to_upstream, encoder_of

WHERE = "aten.where.self"
W = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))


def rows(flag: Tensor, x: Tensor, dim: int = 0) -> int:
    """How many rows a flag leaves: half of them or all."""
    vector = x.select(2, 0).select(1 - dim, 0) if x.dim() == 3 else x.select(1, 0)
    size = cond(flag, lambda v: v.narrow(0, 0, v.shape[0] // 2).clone(), lambda v: v.clone(), vector).shape[0]
    torch._check(size <= x.shape[dim])
    torch._check(size >= 2)
    return size


def halving(f: Callable[..., Tensor], dim: int = 0) -> Callable[..., Tensor]:
    """``f`` of the first rows, the rest as it was."""

    def function(x: Tensor, flag: Tensor, w: Tensor) -> Tensor:
        n = rows(flag, x, dim)
        head = f(x.narrow(dim, 0, n), w)
        return torch.cat((head, x.narrow(dim, n, x.shape[dim] - n)), dim) * 2

    return function


def unbacked(program: torch.export.ExportedProgram) -> list[str]:
    found = []
    for _, module in graph_modules(program):
        for node in module.graph.nodes:
            value = node.meta.get("val")
            sizes = [*getattr(value, "shape", ()), *([value] if isinstance(value, torch.SymInt) else [])]
            if any(
                str(s).startswith("u") for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols
            ):
                found.append(node.name)
    return found


CHEAP: dict[str, Callable[..., Any]] = {
    "norm": lambda x, f, w: cond(f, lambda x, w: layer_norm(x, [4], w[0]), lambda x, w: x.clone(), x, w),
    "same twice": lambda x, f, w: cond(f, lambda x: x.relu().tanh(), lambda x: x.relu().tanh(), x),
    "two results": lambda x, f, w: cond(f, lambda x: (x + 1, x.sum(0)), lambda x: (x - 1, x.amax(0)), x),
    "nested": lambda x, f, w: cond(
        f, lambda x, f: x * 2, lambda x, f: cond(f, lambda x: x + 1, lambda x: x.softmax(-1), x), x, f
    ),
    "slices": lambda x, f, w: cond(f, lambda x: torch.cat((x[:2], x[4:])), lambda x: x[1:5].clone(), x),
    "not": lambda x, f, w: cond(torch.logical_not(f), lambda x: x * 3, lambda x: x / 3, x),
}


@pytest.mark.parametrize("name", list(CHEAP))
def test_cheap_branches_become_where(name: str) -> None:
    program = capture(Program(CHEAP[name], w=W), (X, FLAG))
    before, conds = private(program), ops(program, COND)
    result = IfConvertPass().call(program)
    assert result.modified and result.rewrites == conds and not result.match_failures
    assert ops(program, COND) == 0 and ops(program, WHERE) >= conds
    check_sound(program)
    check_numbers(before, program, (X, FLAG), exact=True)
    again = IfConvertPass().call(program)
    assert not again.modified and not again.rewrites


def _asserting(x: Tensor) -> Tensor:
    torch._assert_async((x.sum() < 1e9), "too large")
    return x + 1


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "linear": (lambda x, f, w: cond(f, lambda x, w: linear(x, w), lambda x, w: x + 1, x, w), "run narrow_cond first"),
    "random": (lambda x, f, w: cond(f, lambda x: torch.rand_like(x), lambda x: x + 1, x), "effect"),
    "sort": (lambda x, f, w: cond(f, lambda x: x.sort(0)[0], lambda x: x + 1, x), "not known to be cheap"),
    "integers": (
        lambda x, f, w: cond(f, lambda x: x.long() // x.long().abs().clamp(1), lambda x: x.long() + 1, x),
        "divides integers",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_refused_says_why(name: str) -> None:
    function, reason = REFUSED[name]
    program = capture(Program(function, w=W), (X, FLAG))
    text = str(program.graph)
    result = IfConvertPass().call(program)
    assert not result.modified and str(program.graph) == text
    assert reason in result.match_failures[0].reason


BATCHED: dict[str, Callable[..., Tensor]] = {
    "linear": lambda x, w: linear(x, w).relu() + x,
    "merged minor": lambda x, w: linear(x.transpose(0, 1).reshape(-1, 4), w).reshape(3, -1, 4).transpose(0, 1),
    "merged major": lambda x, w: linear(x.reshape(-1, 4), w).reshape(-1, 3, 4),
    "attention": lambda x, w: scaled_dot_product_attention(x @ w, x, layer_norm(x, [4])),
    "reductions": lambda x, w: (x - x.mean(-1, keepdim=True)) * x.softmax(1).sum(1, keepdim=True),
    "any and all": lambda x, w: x.where((x > 0).any(-1, True), x * 2) + x.where((x > 0).all(1, True), x * 3),
    "parts": lambda x, w: torch.cat(x.split([1, 3], -1)[::-1], -1) + x.select(1, 0).unsqueeze(1),
}


@pytest.mark.parametrize("name", list(BATCHED))
def test_rows_become_a_mask(name: str) -> None:
    x = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(3))
    program = capture(Program(halving(BATCHED[name]), w=W), (x, FLAG), {0: {0: DYN}})
    before = private(program)
    result = IfConvertPass().call(program)
    assert result.rewrites == 1 and not result.match_failures, result.match_failures
    assert ops(program, COND) == 0 and not unbacked(program)
    assert ops(program, LINEAR) == ops(before, LINEAR) and ops(program, SDPA) == ops(before, SDPA)
    check_sound(program)
    for batch in (4, 6, 10):  # the program itself checks that a half is at least 2
        check_numbers(before, program, (torch.randn(batch, 3, 4), FLAG), exact=False)
    assert not IfConvertPass().call(program).modified


KEYS: dict[str, Callable[..., Tensor]] = {
    "no mask": lambda x, hide, add: scaled_dot_product_attention(x, x, layer_norm(x, [4])),
    "bool": lambda x, hide, add: scaled_dot_product_attention(x, x, x, hide[:, None]),
    "numbers": lambda x, hide, add: scaled_dot_product_attention(x, x, x, add[:, None] * 2),
}


@pytest.mark.parametrize("name", list(KEYS))
def test_chosen_rows_that_attend_to_each_other_do_not_see_the_others(name: str) -> None:
    def run(x: Tensor, f: Tensor, hide: Tensor, add: Tensor) -> Tensor:
        n = rows(f, x, 1)
        head, *masks = (value.narrow(1, 0, n) for value in (x, hide, add))
        return torch.cat([head + KEYS[name](head, *masks), x.narrow(1, n, x.shape[1] - n)], 1)

    def inputs(batch: int, tokens: int) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(tokens)
        hide = torch.rand(batch, tokens, generator=random) < 0.6
        hide[-1] = False  # a row that sees no key
        add = torch.randn(batch, tokens, generator=random).masked_fill(~hide, -torch.inf)
        return torch.randn(batch, tokens, 4, generator=random), FLAG, hide, add

    program = capture(Program(run), inputs(3, 8), {0: {0: DYN, 1: DYN}, 2: {0: DYN, 1: DYN}, 3: {0: DYN, 1: DYN}})
    before = private(program)
    result = IfConvertPass().call(program)
    assert result.rewrites == 1 and not result.match_failures, result.match_failures
    assert ops(program, COND) == 0 and not unbacked(program)
    check_sound(program)
    for batch, tokens in ((2, 4), (3, 8), (5, 14)):
        check_numbers(before, program, inputs(batch, tokens), exact=False)
    assert not IfConvertPass().call(program).modified


def expanded(pair: Tensor, keys: Tensor) -> Tensor:
    """(B·2, N, N): keys one by one added to pairs, as ``torch.nn.MultiheadAttention`` does it."""
    of_heads = keys.unsqueeze(1).unsqueeze(1).expand(-1, 2, -1, -1).reshape(-1, 1, keys.shape[1])
    return (pair.unsqueeze(0) + of_heads).reshape(keys.shape[0], 2, pair.shape[0], -1)


PAIRS: dict[str, Callable[..., Tensor]] = {
    "bool": lambda x, pair, keys: scaled_dot_product_attention(x, x, x, pair),
    "numbers": lambda x, pair, keys: scaled_dot_product_attention(
        x, x, layer_norm(x, [4]), torch.zeros_like(pair, dtype=x.dtype).masked_fill(~pair, -torch.inf)
    ),
    "and keys": lambda x, pair, keys: scaled_dot_product_attention(x, x, x, pair & keys[:, None]),
    "rows of pairs": lambda x, pair, keys: scaled_dot_product_attention(x, x, x, (pair & keys.unsqueeze(2)).transpose(1, 2)),
    "rows alone": lambda x, pair, keys: scaled_dot_product_attention(x, x, x, keys.unsqueeze(2)),
    "made": lambda x, pair, keys: scaled_dot_product_attention(x, x, x, pair & x.new_ones(pair.shape, dtype=torch.bool)),
    "spread": lambda x, pair, keys: scaled_dot_product_attention(x, x, x, keys[:, None].expand(-1, x.shape[1], -1) & pair),
    "heads": lambda x, pair, keys: (
        scaled_dot_product_attention(
            *(x.reshape(x.shape[0], -1, 2, 2).transpose(1, 2) for _ in range(3)),
            expanded(torch.where(pair, 0.0, -torch.inf), torch.where(keys, 0.5, -torch.inf)),
        )
        .transpose(1, 2)
        .reshape(x.shape)
    ),
}


@pytest.mark.parametrize("tokens", ["any", "fixed"])
@pytest.mark.parametrize("name", list(PAIRS))
def test_a_mask_of_pairs_is_followed_in_rows_and_keys(name: str, tokens: str) -> None:
    def run(x: Tensor, f: Tensor, pair: Tensor, keys: Tensor) -> Tensor:
        n = rows(f, x, 1)
        head = x.narrow(1, 0, n)
        head = head + PAIRS[name](head, pair.narrow(0, 0, n).narrow(1, 0, n), keys.narrow(1, 0, n))
        return torch.cat([head, x.narrow(1, n, x.shape[1] - n)], 1)

    def inputs(batch: int, tokens: int) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(tokens)
        pair = torch.rand(tokens, tokens, generator=random) < 0.6
        pair[-1] = pair[1] = False  # rows that see no key, one in each half
        pair[0, : tokens // 2] = False  # and one that sees only keys that are not chosen
        pair[2, tokens // 2 :] = False
        keys = torch.rand(batch, tokens, generator=random) < 0.6
        keys[-1] = False
        return torch.randn(batch, tokens, 4, generator=random), FLAG, pair, keys

    if tokens == "any":
        dynamic: Any = {0: {0: DYN, 1: DYN}, 2: {0: DYN, 1: DYN}, 3: {0: DYN, 1: DYN}}
    else:
        dynamic = {0: {0: DYN}, 3: {0: DYN}}
    program = capture(Program(run), inputs(3, 8), dynamic)
    before = private(program)
    result = IfConvertPass().call(program)
    assert result.rewrites == 1 and not result.match_failures, result.match_failures
    assert ops(program, COND) == 0 and not unbacked(program)
    check_sound(program)
    for batch, size in ((2, 4), (3, 8), (5, 14)) if tokens == "any" else ((2, 8), (5, 8)):
        check_numbers(before, program, inputs(batch, size), exact=False)
    assert not IfConvertPass().call(program).modified


NOT_PAIRS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "any over keys": (lambda x, pair, m: scaled_dot_product_attention(x, x, x, pair.any(-1, keepdim=True)), "may mix"),
    "sum over keys": (lambda x, pair, m: x + m.sum(-1)[:, None], "may mix"),
    "any over rows": (
        lambda x, pair, m: scaled_dot_product_attention(x, x, x, m * (m > 0).any(0, True)),
        "may mix",
    ),
    "greatest over rows": (lambda x, pair, m: scaled_dot_product_attention(x, x, x, m - m.amax(0, keepdim=True)), "may mix"),
    "softmax over keys": (lambda x, pair, m: m.softmax(-1) @ x, "may mix"),
    "product over keys": (lambda x, pair, m: m @ x, "may mix"),
    "norm over keys": (lambda x, pair, m: scaled_dot_product_attention(x, x, x, m / m.norm(dim=-1, keepdim=True)), "may mix"),
    "flip": (lambda x, pair, m: scaled_dot_product_attention(x, x, x, m + m.flip(1)), "may mix"),
    "one dimension": (lambda x, pair, m: x + m.reshape(-1).relu().reshape(m.shape)[:, :1, None].sum(), "cuts across|may mix"),
    "twice": (
        lambda x, pair, m: scaled_dot_product_attention(*[scaled_dot_product_attention(x, x, x, pair)] * 3),
        "no finite number",
    ),
    "after a softmax": (lambda x, pair, m: scaled_dot_product_attention(*[x.softmax(-1)] * 3, pair), "no finite number"),
    "causal": (lambda x, pair, m: scaled_dot_product_attention(x, x, x, is_causal=True), "may mix"),
    "count": (lambda x, pair, m: x * x.shape[1], "number of rows itself"),
    "filled": (lambda x, pair, m: x + x.new_full((x.shape[1], 1), x.shape[1]), "number of rows itself|may mix"),
    "last": (lambda x, pair, m: x + m.select(1, x.shape[1] - 1)[:, None], "number of rows itself|may mix"),
}


@pytest.mark.parametrize("name", list(NOT_PAIRS))
def test_what_mixes_pairs_is_refused(name: str) -> None:
    function, reason = NOT_PAIRS[name]

    def run(x: Tensor, f: Tensor, pair: Tensor) -> Tensor:
        n = rows(f, x, 1)
        head, pair = x.narrow(1, 0, n), pair.narrow(0, 0, n).narrow(1, 0, n)
        head = function(head, pair, torch.where(pair, 0.0, -torch.inf))
        return torch.cat([head, x.narrow(1, n, x.shape[1] - n)], 1)

    program = capture(Program(run), (torch.randn(2, 8, 4), FLAG, torch.rand(8, 8) < 0.6), {0: {1: DYN}, 2: {0: DYN, 1: DYN}})
    text = str(program.graph)
    result = IfConvertPass().call(program)
    assert not result.modified and str(program.graph) == text
    assert any(part in result.match_failures[0].reason for part in reason.split("|")), result.match_failures


MIXING: dict[str, tuple[Callable[..., Tensor], int, str]] = {
    "sum of rows": (lambda x, w: x - x.sum(0, keepdim=True), 0, "may mix"),
    "mask of both sides": (lambda x, w: scaled_dot_product_attention(x, x, x, x @ x.mT), 1, "may mix"),
    "softmax": (lambda x, w: x.softmax(0), 0, "may mix"),
    "flip": (lambda x, w: x.flip(0), 0, "may mix"),
    "joined": (lambda x, w: torch.cat((x[:, :4], x[:, 4:]))[: x.shape[0]].repeat(1, 2, 1), 0, "may mix"),
    "cut": (lambda x, w: x.reshape(-1).reshape(3, -1).softmax(-1).reshape(-1, 3, 4), 0, "cuts across|may mix"),
}


@pytest.mark.parametrize("name", list(MIXING))
def test_mixed_rows_are_refused(name: str) -> None:
    function, dim, reason = MIXING[name]
    x = torch.randn(6, 8, 4)
    if name == "cut":
        x = torch.randn(6, 3, 4)
    program = capture(Program(halving(function, dim), w=W), (x, FLAG), {0: {dim: DYN}})
    text = str(program.graph)
    result = IfConvertPass().call(program)
    assert not result.modified and str(program.graph) == text
    assert any(part in result.match_failures[0].reason for part in reason.split("|")), result.match_failures


def test_chosen_rows_may_not_leave() -> None:
    program = capture(Program(lambda x, f: x[: rows(f, x)] * 2), (X, FLAG), {0: {0: DYN}})
    result = IfConvertPass().call(program)
    assert not result.modified and "leave the graph" in result.match_failures[0].reason


def test_sam3s_encoder_without_a_conditional() -> None:
    captured = sam3x.capture.capture.capture(encoder_of(2), make_spec())
    program = private(captured.program)
    result = IfConvertPass().call(program)
    assert result.rewrites == 14 and not result.match_failures
    assert ops(program, COND) == 0 and not unbacked(program)
    assert ops(program, LINEAR) == 18 and ops(program, SDPA) == 4
    check_sound(program)
    seen = set()
    for batch in (1, 2, 4, 6):
        sizes = [Sizes(batch=batch, tokens=20, prompt_length=4)]
        for sample in samples_for(captured.input_names, ("dac", "pre_norm"), make_spec(), 32, 2, sizes):
            seen.add((batch, sample.branch))
            got = evaluate(program, sample.inputs)[0]
            assert (got - captured.eager(sample.inputs)["output"]).abs().max() <= 2e-5
    assert len(seen) == 14  # dac at batch 1 has no half
    assert not IfConvertPass().call(program).modified


MASKS = ("tgt", "memory", "tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "query_pos")


@pytest.mark.parametrize(
    ("layers", "padding", "tokens", "pre_norm", "mask_dtype"),
    [
        (1, True, 8, "runtime", "float32"),
        (2, True, (2, 40), "runtime", "bool"),
        (1, False, (2, 40), "per-layer", "bool"),
        (4, False, 8, "module", "bool"),
    ],
    ids=str,
)
def test_a_mask_of_all_pairs_whose_rows_dac_halves(
    layers: int, padding: bool, tokens: Any, pre_norm: str, mask_dtype: str
) -> None:
    encoder = encoder_of(layers)
    for index, layer in enumerate(encoder.layers):
        layer.pre_norm = index % 2 == 0
    names = tuple(name for name in MASKS if padding or name != "tgt_key_padding_mask")
    spec = make_spec(dac_dim=1, pre_norm=pre_norm, tokens=tokens, inputs=names, mask_dtype=mask_dtype)
    converted, records = default_pipeline("select").run(sam3x.capture.capture.capture(encoder, spec))
    program = converted.program
    assert not [item for record in records if record.name.startswith("if_convert") for item in record.match_failures]
    assert ops(program, COND) == 0 and not unbacked(program) and ops(program, SDPA) == 2 * layers
    check_sound(program)
    flags = itertools.product((False, True), {"runtime": (False, True), "per-layer": (False, None)}.get(pre_norm, (None,)))
    for (dac, pre), size, hidden in itertools.product(flags, (2, 8, 14) if tokens != 8 else (8,), ("some", "all")):
        case = InputsCase(batch=3, tokens=size, prompt_length=4, hidden=hidden, seed=size)
        inputs = case.make(names, 32, mask_dtype, ())
        own = [layer.pre_norm if pre is None else pre for layer in encoder.layers]
        value = {"runtime": pre, "per-layer": own, "module": None}[pre_norm]
        flag = {} if value is None else {"pre_norm": torch.tensor(value)}
        got = evaluate(program, {**inputs, "dac": torch.tensor(dac), **flag})[0]
        assert_equal_to_upstream(got, encoder.layers, inputs, dac=dac, pre_norm=own, dac_dim=1)


@pytest.mark.parametrize("style", ["bmm", "sdpa"])
def test_attention_as_others_write_it_where_dac_halves_the_tokens(style: str) -> None:
    """Heads in the batch have a size n² // n, which the canonical form must know for n."""
    case = EncoderCase(num_heads=2, styles=(style, "meta"))
    encoder, names = case.build(), ("tgt", "memory", "tgt_mask", "tgt_key_padding_mask", "query_pos")
    spec = make_spec(dac_dim=1, pre_norm=True, tokens=8, inputs=names)
    converted, _ = default_pipeline("select").run(sam3x.capture.capture.capture(encoder, spec))
    assert ops(converted.program, COND) == 0 and ops(converted.program, SDPA) == 2
    for dac in (False, True):
        inputs = InputsCase(tokens=8, hidden="some").make(names, case.d_model, "bool", ())
        got = evaluate(converted.program, {**inputs, "dac": torch.tensor(dac)})[0]
        assert_equal_to_upstream(got, encoder, inputs, dac=dac, pre_norm=True, dac_dim=1)


def test_a_wrong_rewrite_is_caught() -> None:
    program = capture(Program(CHEAP["norm"], w=W), (X, FLAG))
    before = private(program)
    IfConvertPass().call(program)
    (node,) = (n for n in program.graph.nodes if str(n.target) == WHERE)
    node.args = (node.args[0], node.args[2], node.args[1])
    program.graph_module.recompile()
    with pytest.raises(AssertionError):
        check_numbers(before, program, (X, FLAG), exact=False)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tree=trees())
def test_random_conditionals(tree: Any) -> None:
    program = capture(Program(lambda x, p, q: run_tree(tree, x, p, q)), (X, FLAG, OTHER))
    before = private(program)
    IfConvertPass().call(program)
    assert not ops(program, COND)
    check_sound(program)
    check_numbers(before, program, (X, FLAG, OTHER), exact=True)
