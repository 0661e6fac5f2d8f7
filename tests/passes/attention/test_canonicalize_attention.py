"""Every way to write attention becomes one SDPA node with the same numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sam3x.passes.attention.canonicalize_attention import CanonicalizeAttentionPass
from sam3x.passes.base import count_ops
from sam3x.passes.cleanup.eliminate_noops import EliminateNoopsPass
from sam3x.passes.default_pipeline import default_pipeline
from support import attention_functions, masked_attention_functions
from support.attention_inputs import ROOT, B, D, H, N, S, bnhd, padding, qkv, soft
from support.canonical import (
    DYN,
    SDPA,
    SOFTMAX,
    Module,
    capture,
    check_numbers,
    check_plain,
    check_sound,
    evaluate,
    run_pass,
    sdpa_of,
)

STYLES = {**attention_functions.STYLES, **masked_attention_functions.STYLES}
ALONE = [name for name in STYLES if any(word in name for word in ("einsum", "float32", "bert", "flag", "dropout", "nothing"))]


def test_buffers_are_constants() -> None:
    class Gpt(nn.Module):
        """The mask and the fill as buffers, as GPT-2 has them."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("causal", torch.ones(9, 9).tril().bool()[None, None])
            self.register_buffer("low", torch.tensor(-1e4))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = torch.where(self.causal[:, :, :N, :S], q @ k.mT / ROOT, self.low.to(q.dtype))
            return soft(scores) @ v

    run_pass(Gpt(), qkv())


def test_shifted_windows() -> None:
    class Window(nn.Module):
        """A bias by head, then a mask by window on the split batch."""

        def forward(self, x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
            b, n, _ = x.shape
            q, k, v = x.view(b, n, 3, 2, D).permute(2, 0, 3, 1, 4).unbind(0)
            scores = (q * 0.5) @ k.mT + bias[None]
            scores = scores.view(b // 3, 3, 2, n, n) + mask[:, None][None]
            return (soft(scores.view(-1, 2, n, n)) @ v).transpose(1, 2).reshape(b, n, 2 * D)

    run_pass(Window(), (torch.randn(6, N, 6 * D), torch.randn(2, N, N), torch.randn(3, N, N)))


@functools.cache
def canonical(name: str) -> torch.export.ExportedProgram:
    """A style after the passes, checked; not to be changed."""
    function, args = STYLES[name]
    return run_pass(Module(function), args)[0]


@pytest.mark.parametrize("name", STYLES)
def test_style_becomes_one_sdpa(name: str) -> None:
    canonical(name)


@pytest.mark.parametrize("name", ALONE)
def test_style_without_earlier_passes(name: str) -> None:
    function, args = STYLES[name]
    run_pass(Module(function), args, noops=False)


# --- scale, mask kind, shape of what comes out


@pytest.mark.parametrize(
    ("name", "scale"),
    [("scale_split", 0.5), ("scale_split_under_permute", 0.5), ("scale_before_heads_move", 0.5), ("matmul_division", 0.5),
     ("scale_as_constant_tensor", 0.5), ("float_mask_subtracted", 0.3), ("no_scale", 1.0), ("negative_scale", 1.0)],
)  # fmt: skip
def test_scale_is_the_product_of_all_factors(name: str, scale: float) -> None:
    assert sdpa_of(canonical(name)).kwargs["scale"] == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("masked_fill_inf", torch.bool), ("where_keep", torch.bool), ("padding_and_bool_mask", torch.bool),
     ("mask_on_split_heads", torch.bool), ("masked_fill_large", torch.bool), ("finite_and_infinite_fills", torch.float32)],
)  # fmt: skip
def test_masks_that_only_hide_stay_bool(name: str, dtype: torch.dtype) -> None:
    mask = sdpa_of(canonical(name)).args[3]
    assert mask.meta["val"].dtype is dtype


def test_key_padding_mask_stays_small() -> None:
    assert list(sdpa_of(canonical("padding_and_bool_mask")).args[3].meta["val"].shape) == [B, 1, N, S]
    assert list(sdpa_of(canonical("mask_on_split_heads")).args[3].meta["val"].shape) == [B, 1, 1, S]


def test_row_hidden_everywhere_by_minus_infinity_gives_zeros() -> None:
    hidden = (*qkv(), torch.ones(B, S, dtype=torch.bool))
    assert torch.equal(evaluate(canonical("masked_fill_inf"), hidden), torch.zeros(B, H, N, D))


# --- dynamic sizes

DYNAMIC = {
    "matmul_scale_after": ({0: DYN, 2: DYN}, {0: DYN, 2: DYN}, {0: DYN, 2: DYN}),
    "masked_fill_large": ({0: DYN, 2: DYN}, {0: DYN, 2: DYN}, {0: DYN, 2: DYN}, {0: DYN, 1: DYN}),
    "padding_and_float_mask": ({0: DYN, 2: DYN}, {0: DYN, 2: DYN}, {0: DYN, 2: DYN}, {0: DYN, 1: DYN}, {0: DYN, 1: DYN}),
    "bmm_heads_in_batch": ({0: DYN, 1: DYN}, {0: DYN, 1: DYN}, {0: DYN, 1: DYN}),
    "einsum": ({0: DYN, 1: DYN}, {0: DYN, 1: DYN}, {0: DYN, 1: DYN}),
    "einsum_scores_bnhs_masked": ({0: DYN, 1: DYN}, {0: DYN, 1: DYN}, {0: DYN, 1: DYN}, {0: DYN, 1: DYN}),
    "softmax_over_the_middle": ({0: DYN, 1: DYN}, {0: DYN, 1: DYN}, {0: DYN, 1: DYN}),
    "causal_flag_more_keys": ({0: DYN, 2: DYN}, {0: DYN, 2: DYN}, {0: DYN, 2: DYN}),
    "grouped_flag": ({0: DYN, 2: DYN}, {0: DYN, 2: DYN}, {0: DYN, 2: DYN}),
    "one_key_head": ({0: DYN, 2: DYN}, {0: DYN, 2: DYN}, {0: DYN, 2: DYN}),
}


def resized(name: str, batch: int, n: int, s: int) -> tuple[Tensor, ...]:
    """Inputs of another size for a dynamic style."""
    torch.manual_seed(1)
    result = []
    for arg, dims in zip(STYLES[name][1], DYNAMIC[name], strict=True):
        shape = [{0: batch}.get(d, {N: n, S: s}.get(x, x)) if d in dims else x for d, x in enumerate(arg.shape)]
        if name == "padding_and_float_mask" and arg.dim() == 2 and arg.is_floating_point():
            shape = [n, s]
        result.append(torch.randn(shape) if arg.is_floating_point() else torch.arange(s).expand(shape) >= s - 1)
    return tuple(result)


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_sizes(name: str) -> None:
    module = Module(STYLES[name][0])
    program, _ = run_pass(module, STYLES[name][1], DYNAMIC[name])
    for sizes in ((2, 9, 4), (4, 3, 11), (3, 6, 6)):
        check_numbers(module, program, resized(name, *sizes))


def test_sizes_read_from_the_scores() -> None:
    def function(q, k, v):
        scores = q @ k.mT / ROOT
        *_, n, s = scores.shape
        hide = torch.arange(s)[None] > torch.arange(n)[:, None]
        return soft(scores.masked_fill(hide, -math.inf)) @ v

    args = qkv()
    run_pass(Module(function), args, tuple({0: DYN, 2: DYN} for _ in args))


# --- branches


def test_inside_branches() -> None:
    def function(flag, q, k, v, hide):
        def yes(q, k, v, hide):
            return (soft((q @ k.mT * 0.5).masked_fill(hide[:, None, None], -math.inf)) @ v,)

        def no(q, k, v, hide):
            return (soft((q * 0.5) @ k.mT) @ v,)

        return torch.ops.higher_order.cond(flag, yes, no, (q, k, v, hide))[0]

    module, args = Module(function), (*qkv(), padding())
    program = capture(module, (torch.tensor(True), *args), (None, *[{0: DYN}] * 4))
    EliminateNoopsPass().call(program)
    result = CanonicalizeAttentionPass().call(program)
    assert result.rewrites == 2 and result.modified and not result.match_failures
    assert count_ops(program)[SDPA] == 2 and SOFTMAX not in count_ops(program)
    check_sound(program)
    check_plain(program)
    for flag in (True, False):
        check_numbers(module, program, (torch.tensor(flag), *args))
    assert not CanonicalizeAttentionPass().call(program).modified


# --- the harness


@pytest.mark.parametrize("damage", ["scale", "mask", "value"])
def test_a_wrong_rewrite_is_caught(damage: str) -> None:
    function, args = STYLES["where_keep"]
    module = Module(function)
    program, _ = run_pass(module, args)
    node = sdpa_of(program)
    if damage == "scale":
        node.kwargs = {**node.kwargs, "scale": node.kwargs["scale"] * 1.01}
    elif damage == "mask":
        node.update_arg(3, None)
    else:
        node.update_arg(2, node.args[1])
    program.graph_module.recompile()
    with pytest.raises(AssertionError):
        check_numbers(module, program, args)


def test_default_pipeline_order() -> None:
    names = default_pipeline().names
    assert names.index("eliminate_noops") < names.index("canonicalize_attention") < names.index("narrow_cond")
    assert default_pipeline("select").names == (*names, "if_convert")


# --- random combinations


@st.composite
def attentions(draw: st.DrawFn) -> tuple[Callable[..., Tensor], str]:
    layout = draw(st.sampled_from(["BHND", "BH_joined", "N_BH", "einsum"]))
    places = draw(st.lists(st.sampled_from(["q", "k", "after", "divide", "after_mask"]), max_size=3))
    masks = draw(st.lists(st.sampled_from(["float", "inf", "min", "large", "where"]), max_size=3))
    cast = draw(st.booleans())

    def function(q: Tensor, k: Tensor, v: Tensor, hide: Tensor, bias: Tensor) -> Tensor:
        for place in places:
            q, k = (q * 0.7 if place == "q" else q), (k * 0.8 if place == "k" else k)
        if layout == "BH_joined":
            q, k, v = (x.transpose(1, 2).reshape(B * H, -1, D) for x in (q, k, v))
        elif layout == "N_BH":
            q, k, v = (x.transpose(0, 1).reshape(-1, B * H, D).transpose(0, 1) for x in (q, k, v))
        elif layout == "BHND":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = torch.einsum("bnhd,bshd->bhns", q, k) if layout == "einsum" else q @ k.mT
        for place in places:
            scores = scores * 0.6 if place == "after" else scores / 1.5 if place == "divide" else scores
        scores = scores.reshape(B, H, N, S)
        for mask in masks:
            if mask == "float":
                scores = scores + bias
            elif mask == "where":
                scores = torch.where(~hide[:, None, None], scores, -math.inf)
            else:
                low = {"inf": -math.inf, "min": torch.finfo(scores.dtype).min, "large": -1e9}[mask]
                scores = scores.masked_fill(hide[:, None, None], low)
        if "after_mask" in places:
            scores = scores * 0.5
        weights = scores.softmax(-1, dtype=torch.float32 if cast and scores.dtype is torch.float32 else None)
        if layout == "einsum":
            return torch.einsum("bhns,bshd->bnhd", weights, v)
        if layout in ("BH_joined", "N_BH"):
            return torch.bmm(weights.reshape(B * H, N, S), v)
        return (weights @ v).transpose(1, 2)

    return function, f"{layout} {places} {masks} {cast}"


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=attentions())
def test_random_combinations(case: tuple[Callable[..., Tensor], str]) -> None:
    args = (*bnhd(*qkv()), padding(), torch.randn(N, S, generator=torch.Generator().manual_seed(0)))
    run_pass(Module(case[0]), args)
