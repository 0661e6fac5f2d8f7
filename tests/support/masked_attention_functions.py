"""Attention with masks, written as functions in many ways."""

from __future__ import annotations

import math

import torch
from torch import nn

from support.attention_inputs import ROOT, B, D, H, N, S, Styles, bnhd, keeper, padding, qkv, soft

STYLES: Styles = {}
style = keeper(STYLES)


@style(*(x[:, 0] for x in qkv()), torch.randn(B, N, S))
def baddbmm_mask(q, k, v, mask):
    return torch.bmm(soft(torch.baddbmm(mask, q, k.mT, beta=0.5, alpha=D**-0.5)), v)


@style(*bnhd(*qkv()), padding())
def einsum_scores_bnhs_masked(q, k, v, hide):
    scores = torch.einsum("bnhd,bshd->bnhs", q, k).masked_fill(hide[:, None, None], -math.inf)
    return torch.einsum("bnhs,bshd->bhdn", soft(scores), v)


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


@style(*qkv(n=S, heads=4, kv_heads=2))
def grouped_causal_flag(q, k, v):
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


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
