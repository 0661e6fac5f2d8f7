"""Every way to write attention becomes one SDPA node with the same numbers; what is no attention stays, with a reason."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sam3x.passes
from sam3x.errors import SpecError
from sam3x.passes.base import PassResult, count_ops, graph_modules
from sam3x.passes.canonicalize_attention import CanonicalizeAttentionPass
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.passes.eliminate_noops import EliminateNoopsPass
from sam3x.program import run_program

aten = torch.ops.aten
SDPA, SOFTMAX = "aten.scaled_dot_product_attention.default", "aten._softmax.default"
B, H, N, S, D = 2, 3, 5, 7, 4
DYN = torch.export.Dim.DYNAMIC


class Module(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def capture(module: nn.Module, args: tuple[Tensor, ...], dynamic: tuple | None = None) -> torch.export.ExportedProgram:
    """Export and decompose as exporter/capture.py does."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            shapes = None if dynamic is None else {"args": dynamic} if isinstance(module, Module) else dynamic
            program = torch.export.export(module.eval(), args, dynamic_shapes=shapes, strict=False)
            table = torch.export.default_decompositions()
            for op in (aten.linear, aten.layer_norm, aten.matmul, aten.scaled_dot_product_attention):
                table.pop(op.default, None)
            return program.run_decompositions(table)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def evaluate(program: torch.export.ExportedProgram, args: tuple[Tensor, ...]) -> Tensor:
    names = program.graph_signature.user_inputs
    return run_program(program, dict(zip(names, args, strict=True)), ("output",))["output"]


def to(dtype: torch.dtype, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(arg.to(dtype) if arg.is_floating_point() else arg for arg in args)


def check_sound(program: torch.export.ExportedProgram) -> None:
    """Lint, validate, and a value on every node."""
    for _, module in graph_modules(program):
        module.graph.lint()
        for node in module.graph.nodes:
            if node.op in ("call_function", "placeholder") and "_assert_tensor_metadata" not in str(node.target):
                assert "val" in node.meta, node.name
    program.validate()


def check_plain(program: torch.export.ExportedProgram) -> None:
    """Every SDPA node is plain, its operands agree in type and rank, its mask broadcasts."""
    for _, module in graph_modules(program):
        for node in module.graph.nodes:
            if str(node.target) != SDPA:
                continue
            assert node.args[4:] in ((), (0.0, False)) and not node.kwargs.get("enable_gqa")
            assert node.kwargs.get("scale") is None or type(node.kwargs["scale"]) is float
            q, k, v = (item.meta["val"] for item in node.args[:3])
            assert q.dtype == k.dtype == v.dtype and q.dim() == k.dim() == v.dim() == 4
            assert list(q.shape[:-2]) == list(k.shape[:-2]) == list(v.shape[:-2])
            mask = node.args[3].meta["val"] if len(node.args) > 3 and node.args[3] is not None else None
            assert mask is None or mask.dtype in (torch.bool, q.dtype)


def check_numbers(module: nn.Module, program: torch.export.ExportedProgram, args: tuple[Tensor, ...]) -> None:
    """No further from eager float64 than 4 times eager's own distance."""
    with torch.no_grad():
        eager = module(*args)
        exact = copy.deepcopy(module).double()(*to(torch.float64, args))
    got = evaluate(program, args)
    assert got.shape == eager.shape and got.dtype == eager.dtype
    defined = ~exact.isnan()  # a plain softmax gives NaN where a row's keys are all hidden with -inf; SDPA gives zeros
    own = (eager.double() - exact)[defined].abs().max().item()
    distance = (got.double() - exact)[defined].abs().max().item()
    floor = {torch.float32: 1e-6, torch.float64: 1e-12}.get(eager.dtype, 1e-3)
    assert distance <= 4 * own + floor, (distance, own)
    assert not got.isnan().any()


def run_pass(
    module: nn.Module, args: tuple[Tensor, ...], dynamic: tuple | None = None, *, rewrites: int = 1, noops: bool = True
) -> tuple[torch.export.ExportedProgram, PassResult]:
    """Capture, run, and check everything a rewrite must keep."""
    program = capture(module, args, dynamic)
    if noops:
        EliminateNoopsPass().call(program)
    guards = len(_guards(program))
    result = CanonicalizeAttentionPass().call(program)
    counts = count_ops(program)
    assert result.rewrites == rewrites, result.missed
    assert counts.get(SDPA, 0) == rewrites and SOFTMAX not in counts, (counts, result.missed)
    assert result.modified and not result.missed
    assert len(_guards(program)) == guards
    check_sound(program)
    check_plain(program)
    check_numbers(module, program, args)
    again = CanonicalizeAttentionPass().call(program)
    assert not again.modified and not again.rewrites
    return program, result


def _guards(program: torch.export.ExportedProgram) -> list:
    for node in program.graph.nodes:
        fake = torch._guards.detect_fake_mode(node.meta.get("val"))
        if fake is not None and fake.shape_env is not None:
            return list(fake.shape_env.guards)
    return []


def qkv(n: int = N, s: int = S, heads: int = H, kv_heads: int = H, batch: int = B, seed: int = 0) -> tuple[Tensor, ...]:
    """(B, H, N, D), (B, Hkv, S, D), (B, Hkv, S, D)."""
    torch.manual_seed(seed)
    return torch.randn(batch, heads, n, D), torch.randn(batch, kv_heads, s, D), torch.randn(batch, kv_heads, s, D)


def padding(batch: int = B, s: int = S) -> Tensor:
    """(B, S) bool, True = hidden; every row keeps a key."""
    mask = torch.arange(s)[None] >= torch.tensor([s - 2, s])[:batch, None]
    return mask


def bnhd(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.transpose(1, 2).contiguous() for tensor in tensors)


def soft(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


# --- every style: name → (function, args)

ROOT = math.sqrt(D)
FMIN = torch.finfo(torch.float32).min
STYLES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {}


def style(*args: Tensor) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def keep(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        STYLES[function.__name__] = (function, args)
        return function

    return keep


@style(*qkv())
def matmul_scale_after(q, k, v):
    return soft(q @ k.transpose(-2, -1) * D**-0.5) @ v


@style(*qkv())
def matmul_division(q, k, v):
    return soft(torch.matmul(q, k.mT) / ROOT) @ v


@style(*qkv())
def scale_before(q, k, v):
    return soft((q * D**-0.5) @ k.mT) @ v


@style(*qkv())
def scale_split(q, k, v):
    return soft((q * D**-0.25) @ (k * D**-0.25).mT) @ v


@style(*qkv())
def scale_split_under_permute(q, k, v):
    return soft((q / D**0.25) @ (k.mT / D**0.25)) @ v


@style(*bnhd(*qkv()))
def scale_before_heads_move(q, k, v):
    q, k, v = ((q * 0.25).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return soft(2 * (q @ k.mT)) @ v


@style(*qkv())
def scale_as_constant_tensor(q, k, v):
    return soft(q @ k.mT / torch.sqrt(torch.tensor(float(D)))) @ v


@style(*qkv())
def no_scale(q, k, v):
    return soft(q @ k.mT) @ v


@style(*qkv())
def negative_scale(q, k, v):
    return soft(-(q @ k.mT)) @ v


@style(*bnhd(*qkv()))
def bmm_heads_in_batch(q, k, v):
    b, n, h, d = q.shape
    q, k, v = (x.transpose(1, 2).reshape(b * h, -1, d) for x in (q, k, v))
    out = torch.bmm(soft(torch.bmm(q, k.mT) * d**-0.5), v)
    return out.view(b, h, n, d).transpose(1, 2).reshape(b, n, h * d)


@style(*bnhd(*qkv()))
def bmm_sequence_first(q, k, v):
    q, k, v = (x.permute(1, 0, 2, 3).reshape(-1, B * H, D).transpose(0, 1) for x in (q, k, v))
    out = torch.bmm(soft(torch.bmm(q, k.transpose(1, 2)) / ROOT), v)
    return out.transpose(0, 1).reshape(N, B, H * D)


@style(*(x[:, 0] for x in qkv()), torch.randn(B, N, S))
def baddbmm_mask(q, k, v, mask):
    return torch.bmm(soft(torch.baddbmm(mask, q, k.mT, beta=0.5, alpha=D**-0.5)), v)


@style(*(x[0, 0] for x in qkv()))
def two_dimensional(q, k, v):
    return soft(q @ k.T / ROOT) @ v


@style(*bnhd(*qkv()))
def einsum(q, k, v):
    return torch.einsum("bhns,bshd->bnhd", soft(torch.einsum("bnhd,bshd->bhns", q, k) / ROOT), v)


@style(*bnhd(*qkv()))
def einsum_scores_bnhs(q, k, v):
    return torch.einsum("bnhs,bshd->bnhd", soft(torch.einsum("bnhd,bshd->bnhs", q, k) / ROOT), v)


@style(*bnhd(*qkv()), padding())
def einsum_scores_bnhs_masked(q, k, v, hide):
    scores = torch.einsum("bnhd,bshd->bnhs", q, k).masked_fill(hide[:, None, None], -math.inf)
    return torch.einsum("bnhs,bshd->bhdn", soft(scores), v)


@style(*bnhd(*qkv()))
def einsum_value_first(q, k, v):
    return torch.einsum("bshd,bhns->bhdn", v, soft(torch.einsum("bshd,bnhd->bhns", k, q) / ROOT))


@style(*bnhd(*qkv()))
def softmax_over_the_middle(q, k, v):
    return torch.einsum("bhsn,bshd->bnhd", torch.einsum("bnhd,bshd->bhsn", q, k).softmax(2), v)


@style(*qkv())
def keys_times_queries(q, k, v):
    return soft((k @ q.mT).mT / ROOT) @ v


@style(*qkv(), torch.randn(N, S))
def float_mask_added(q, k, v, mask):
    return soft(q @ k.mT / ROOT + mask) @ v


@style(*qkv(), torch.randn(B, 1, N, S))
def float_mask_added_first(q, k, v, mask):
    return soft((mask + q @ k.mT) / ROOT) @ v


@style(*qkv(), torch.randn(N, S))
def float_mask_subtracted(q, k, v, mask):
    return soft(torch.sub(q @ k.mT, mask, alpha=2) * 0.3) @ v


@style(*qkv(), padding())
def masked_fill_inf(q, k, v, hide):
    return soft((q @ k.mT / ROOT).masked_fill(hide[:, None, None], -math.inf)) @ v


@style(*qkv(), padding())
def masked_fill_finfo_min(q, k, v, hide):
    scores = q @ k.mT / ROOT
    return soft(scores.masked_fill(hide[:, None, None], torch.finfo(scores.dtype).min)) @ v


@style(*qkv(), padding())
def masked_fill_large(q, k, v, hide):
    return soft((q @ k.mT / ROOT).masked_fill(hide[:, None, None], -1e9)) @ v


@style(*qkv(), torch.ones(B, S, dtype=torch.bool))
def all_hidden_finite(q, k, v, hide):
    return soft((q @ k.mT / ROOT).masked_fill(hide[:, None, None], -1e4)) @ v


@style(*qkv(), padding())
def masked_before_scale(q, k, v, hide):
    return soft((q @ k.mT).masked_fill(hide[:, None, None], -1e9) / ROOT) @ v


@style(*qkv(), ~padding())
def where_keep(q, k, v, keep):
    scores = q @ k.mT / ROOT
    return soft(torch.where(keep[:, None, None], scores, -math.inf)) @ v


@style(*qkv(), padding())
def where_hide_tensor(q, k, v, hide):
    scores = q @ k.mT / ROOT
    return soft(torch.where(hide[:, None, None], torch.full_like(scores, -math.inf), scores)) @ v


@style(*qkv(), ~padding())
def masked_fill_not(q, k, v, keep):
    return soft((q @ k.mT / ROOT).masked_fill(~keep[:, None, None], -math.inf)) @ v


@style(*qkv(), ~padding())
def bert_mask(q, k, v, keep):
    return soft(q @ k.mT / ROOT + (1.0 - keep[:, None, None].to(q.dtype)) * -10000.0) @ v


@style(*qkv(), padding(), torch.randn(N, S))
def padding_and_float_mask(q, k, v, hide, mask):
    return soft((q @ k.mT / ROOT + mask).masked_fill(hide[:, None, None], -math.inf)) @ v


@style(*qkv(), padding(), torch.randn(N, S) > 2)
def padding_and_bool_mask(q, k, v, hide, mask):
    scores = (q @ k.mT / ROOT).masked_fill(mask, -math.inf)
    return soft(scores.masked_fill(hide[:, None, None], -math.inf)) @ v


@style(*qkv(), padding(), torch.randn(N, S).triu(3) * 1e9)
def finite_padding_then_float_mask(q, k, v, hide, mask):
    return soft((q @ k.mT / ROOT).masked_fill(hide[:, None, None], -1e9) + mask.clamp(max=0)) @ v


@style(*qkv(), padding(), torch.randn(N, S) > 1)
def finite_and_infinite_fills(q, k, v, hide, mask):
    scores = (q @ k.mT / ROOT).masked_fill(mask, -1e4)
    return soft(scores.masked_fill(hide[:, None, None], -math.inf)) @ v


@style(*qkv(), padding())
def mask_on_split_heads(q, k, v, hide):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.mT).view(B, H, N, S).masked_fill(hide[:, None, None], -math.inf)
    return torch.bmm(soft(scores.view(B * H, N, S)), v)


@style(*qkv(), torch.randn(H, N, N + 2))
def bias_by_head_on_joined_heads(q, k, v, bias):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.mT).view(B, H, N, S) + bias
    return torch.bmm(soft(scores).view(B * H, N, S), v)


@style(*qkv(n=S))
def causal_triu(q, k, v):
    hide = torch.ones(S, S, dtype=torch.bool).triu(1)
    return soft((q @ k.mT / ROOT).masked_fill(hide, -math.inf)) @ v


@style(*qkv(n=S))
def causal_float(q, k, v):
    return soft(q @ k.mT / ROOT + torch.full((S, S), -math.inf).triu(1)) @ v


@style(*qkv(n=S))
def causal_tril_zero(q, k, v):
    return soft((q @ k.mT / ROOT).masked_fill(torch.tril(torch.ones(S, S)) == 0, -1e9)) @ v


@style(*qkv(n=S))
def causal_flag(q, k, v):
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@style(*qkv())
def causal_flag_more_keys(q, k, v):
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


@style(*qkv(heads=4, kv_heads=2))
def grouped_flag(q, k, v):
    return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@style(*qkv(n=S, heads=4, kv_heads=2))
def grouped_causal_flag(q, k, v):
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@style(*qkv(heads=4, kv_heads=2))
def grouped_expand(q, k, v):
    k, v = (x[:, :, None].expand(B, 2, 2, S, D).reshape(B, 4, S, D) for x in (k, v))
    return soft(q @ k.mT / ROOT) @ v


@style(*qkv(heads=4, kv_heads=2))
def grouped_repeat_interleave(q, k, v):
    return soft(q @ k.repeat_interleave(2, 1).mT / ROOT) @ v.repeat_interleave(2, 1)


@style(*qkv(heads=4, kv_heads=2), padding())
def grouped_five_dimensions(q, k, v, hide):
    scores = q.view(B, 2, 2, N, D) @ k[:, :, None].mT / ROOT
    out = soft(scores.masked_fill(hide[:, None, None, None], -math.inf)) @ v[:, :, None]
    return out.reshape(B, 4, N, D)


@style(*qkv(heads=4, kv_heads=2), padding())
def grouped_einsum(q, k, v, hide):
    scores = torch.einsum("bhgnd,bhsd->bhgns", q.view(B, 2, 2, N, D), k) / ROOT
    probabilities = soft(scores.masked_fill(hide[:, None, None, None], -math.inf))
    return torch.einsum("bhgns,bhsd->bhgnd", probabilities, v).flatten(1, 2)


@style(*qkv(kv_heads=1))
def one_key_head(q, k, v):
    return soft(q @ k.mT / ROOT) @ v


@style(*qkv(s=1))
def one_key(q, k, v):
    return soft(q @ k.mT / ROOT) @ v


@style(*qkv(n=1, batch=1, heads=1, kv_heads=1))
def everything_one(q, k, v):
    return soft(q @ k.mT / ROOT) @ v


@style(*qkv(n=S))
def square_sizes(q, k, v):
    return soft(q @ k.mT / ROOT) @ v


@style(*qkv())
def softmax_in_float32(q, k, v):
    return (q @ k.mT / ROOT).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


@style(*(x.half() for x in qkv()), padding())
def half_softmax_in_float32(q, k, v, hide):
    scores = (q @ k.mT).float() / ROOT
    return soft(scores.masked_fill(hide[:, None, None], -math.inf)).to(q.dtype) @ v


@style(*(x.bfloat16() for x in qkv()), torch.where(padding(), -1e30, 0.0)[:, None, None])
def bfloat16_float32_mask(q, k, v, mask):
    return soft((q @ k.mT).float() * D**-0.5 + mask).to(q.dtype) @ v


@style(*(x.half() for x in qkv()), torch.ones(B, S, dtype=torch.bool))
def half_all_hidden_finite(q, k, v, hide):
    scores = q @ k.mT / ROOT
    return soft(scores.masked_fill(hide[:, None, None], torch.finfo(scores.dtype).min)) @ v


@style(*(x.half() for x in qkv()))
def products_in_float32(q, k, v):
    return soft(q.float() @ k.float().mT / ROOT).to(v.dtype) @ v


@style(*qkv())
def dropout_in_eval(q, k, v):
    return nn.functional.dropout(soft(q @ k.mT / ROOT), 0.1, training=False) @ v


@style(*qkv())
def weights_computed_for_nothing(q, k, v):
    weights = soft(q @ k.mT / ROOT)
    weights.mean(1)
    return weights @ v


@style(*qkv(), padding())
def some_rows_hidden_everywhere(q, k, v, hide):
    hide = hide[:, None, None] | (torch.arange(N)[:, None] == 1)
    return soft((q @ k.mT / ROOT).masked_fill(hide, -math.inf)) @ v


@style(*qkv(), torch.rand(B, H, N, S), torch.tensor([True, False, True, False, False])[:, None])
def two_finite_fills(q, k, v, gate, rows):
    scores = (q @ k.mT).masked_fill(gate > 0.5, -1e4)
    return soft(scores.masked_fill((gate < 0.5) & rows, -2e4)) @ v


@style(*qkv(), torch.ones(B, S, dtype=torch.bool), torch.randn(N, S))
def float_mask_where_all_is_hidden(q, k, v, hide, mask):
    return soft((q @ k.mT / ROOT).masked_fill(hide[:, None, None], -1e4) + mask) @ v


@style(*qkv())
def mask_like_the_scores(q, k, v):
    scores = q @ k.mT / ROOT
    return soft(scores + torch.zeros_like(scores).masked_fill(torch.ones(N, S).triu(2) > 0, -math.inf)) @ v


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


def sdpa_of(program: torch.export.ExportedProgram) -> torch.fx.Node:
    return next(node for _, module in graph_modules(program) for node in module.graph.nodes if str(node.target) == SDPA)


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
     ("mask_on_split_heads", torch.bool), ("masked_fill_large", torch.float32), ("finite_and_infinite_fills", torch.float32)],
)  # fmt: skip
def test_masks_of_minus_infinity_stay_bool(name: str, dtype: torch.dtype) -> None:
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
    assert result.rewrites == 2 and result.modified and not result.missed
    assert count_ops(program)[SDPA] == 2 and SOFTMAX not in count_ops(program)
    check_sound(program)
    check_plain(program)
    for flag in (True, False):
        check_numbers(module, program, (torch.tensor(flag), *args))
    assert not CanonicalizeAttentionPass().call(program).modified


def test_reason_in_a_branch_names_it() -> None:
    def function(flag, q, k, v):
        yes = lambda q, k, v: (soft(torch.tanh(q @ k.mT)) @ v,)  # noqa: E731
        return torch.ops.higher_order.cond(flag, yes, lambda q, k, v: (q + 1,), (q, k, v))[0]

    program = capture(Module(function), (torch.tensor(True), *qkv()))
    (missed,) = CanonicalizeAttentionPass().call(program).missed
    assert missed.node.startswith("true_graph_0.") and "tanh" in missed.reason


# --- nn.MultiheadAttention in all its modes

MHA_MODES: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"kdim": 6, "vdim": 10},
    {"kdim": 6, "vdim": 10, "batch_first": True},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"dropout": 0.3},
]


class Mha(nn.Module):
    """nn.MultiheadAttention whose weights, asked for or not, nobody uses."""

    def __init__(self, need_weights: bool, average: bool, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, **options)
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.options = {"need_weights": need_weights, "average_attn_weights": average}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, hide: Tensor, mask: Tensor) -> Tensor:
        return self.attention(q, k, v, key_padding_mask=hide, attn_mask=mask, **self.options)[0]


MHA_CASES = [
    *((mode, weights, mask) for mode in MHA_MODES for weights, mask in (("none", "bool"), ("average", "bool"))),
    *((mode, "each", "float") for mode in MHA_MODES[:2]),
    (MHA_MODES[7], "average", "float"),
]


@pytest.mark.parametrize(
    ("mode", "weights", "mask"), MHA_CASES, ids=lambda item: "-".join(item) or "default" if isinstance(item, dict) else item
)
def test_multihead_attention(mode: dict[str, Any], weights: str, mask: str) -> None:
    module = Mha(weights != "none", weights == "average", **mode).eval()
    torch.manual_seed(0)
    shape = (lambda n: (B, n)) if mode.get("batch_first") else (lambda n: (n, B))
    k, v = torch.randn(*shape(S), mode.get("kdim", 8)), torch.randn(*shape(S), mode.get("vdim", 8))
    attn_mask = torch.arange(S)[None] > torch.arange(N)[:, None] + 2 if mask == "bool" else torch.randn(N, S)
    hide = padding() if mask == "bool" else torch.where(padding(), -math.inf, 0.0)
    args = (torch.randn(*shape(N), 8), k, v, hide, attn_mask)
    program = capture(module, args)
    asked = weights != "none"
    assert (SOFTMAX in count_ops(program)) == asked
    result = CanonicalizeAttentionPass().call(program)
    assert result.rewrites == int(asked) and result.modified == asked and not result.missed
    assert count_ops(program)[SDPA] == 1 and SOFTMAX not in count_ops(program)
    check_sound(program)
    check_plain(program)
    check_numbers(module, program, args)
    assert not CanonicalizeAttentionPass().call(program).modified


def test_multihead_attention_dynamic() -> None:
    module = Mha(True, True, batch_first=True).eval()
    args = (torch.randn(B, N, 8), torch.randn(B, S, 8), torch.randn(B, S, 8), padding(), torch.randn(N, S))
    sizes = ({0: DYN, 1: DYN}, {0: DYN, 1: DYN}, {0: DYN, 1: DYN}, {0: DYN, 1: DYN}, {0: DYN, 1: DYN})
    program, _ = run_pass(module, args, sizes)
    other = (torch.randn(4, 9, 8), torch.randn(4, 3, 8), torch.randn(4, 3, 8), torch.arange(3).expand(4, 3) > 1)
    check_numbers(module, program, (*other, torch.randn(9, 3)))


# --- refusals


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
    assert [reason in missed.reason for missed in result.missed] == [True], result.missed


def test_weights_that_are_returned_are_refused() -> None:
    def function(q, k, v):
        weights = soft(q @ k.mT)
        return weights @ v, weights

    result = CanonicalizeAttentionPass().call(capture(Module(function), qkv()))
    assert not result.modified and "used 2 times" in result.missed[0].reason


def test_learnt_scale_is_refused() -> None:
    class Learnt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return soft(q @ k.mT * self.scale) @ v

    result = CanonicalizeAttentionPass().call(capture(Learnt(), qkv()))
    assert not result.modified and "is a tensor" in result.missed[0].reason


@pytest.mark.parametrize("function", [lambda x: soft(x), lambda x: soft(x * 2) + 1, lambda x: soft(x.mT)])
def test_other_softmaxes_are_not_mentioned(function: Callable[..., Tensor]) -> None:
    result = CanonicalizeAttentionPass().call(capture(Module(function), (torch.randn(B, N, S),)))
    assert not result.modified and not result.missed


def test_plain_sdpa_stays() -> None:
    program = capture(Module(nn.functional.scaled_dot_product_attention), qkv())
    assert not CanonicalizeAttentionPass().call(program).modified


# --- custom operators


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
    assert not result.modified and "more than the first result" in result.missed[0].reason


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
    assert re.search(reason, result.missed[0].reason)


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
