"""Attention without a mask, written as functions in many ways: products, scales, layouts, heads, types."""

from __future__ import annotations

import torch
from torch import nn

from support.attention_inputs import ROOT, B, D, H, N, S, Styles, bnhd, keeper, qkv, soft

STYLES: Styles = {}
style = keeper(STYLES)


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


@style(*(x[0, 0] for x in qkv()))
def two_dimensional(q, k, v):
    return soft(q @ k.T / ROOT) @ v


@style(*bnhd(*qkv()))
def einsum(q, k, v):
    return torch.einsum("bhns,bshd->bnhd", soft(torch.einsum("bnhd,bshd->bhns", q, k) / ROOT), v)


@style(*bnhd(*qkv()))
def einsum_scores_bnhs(q, k, v):
    return torch.einsum("bnhs,bshd->bnhd", soft(torch.einsum("bnhd,bshd->bnhs", q, k) / ROOT), v)


@style(*bnhd(*qkv()))
def einsum_value_first(q, k, v):
    return torch.einsum("bshd,bhns->bhdn", v, soft(torch.einsum("bshd,bnhd->bhns", k, q) / ROOT))


@style(*bnhd(*qkv()))
def softmax_over_the_middle(q, k, v):
    return torch.einsum("bhsn,bshd->bnhd", torch.einsum("bnhd,bshd->bhsn", q, k).softmax(2), v)


@style(*qkv())
def keys_times_queries(q, k, v):
    return soft((k @ q.mT).mT / ROOT) @ v


@style(*qkv(heads=4, kv_heads=2))
def grouped_flag(q, k, v):
    return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@style(*qkv(heads=4, kv_heads=2))
def grouped_expand(q, k, v):
    k, v = (x[:, :, None].expand(B, 2, 2, S, D).reshape(B, 4, S, D) for x in (k, v))
    return soft(q @ k.mT / ROOT) @ v


@style(*qkv(heads=4, kv_heads=2))
def grouped_repeat_interleave(q, k, v):
    return soft(q @ k.repeat_interleave(2, 1).mT / ROOT) @ v.repeat_interleave(2, 1)


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
