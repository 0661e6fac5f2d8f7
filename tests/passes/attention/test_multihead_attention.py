"""``nn.MultiheadAttention`` in all its modes becomes one SDPA node."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam3x.passes.attention.canonicalize_attention import CanonicalizeAttentionPass
from sam3x.passes.base import count_ops
from support.attention_inputs import B, N, S, padding
from support.canonical import DYN, SDPA, SOFTMAX, capture, check_numbers, check_plain, check_sound, run_pass

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
    assert result.rewrites == int(asked) and result.modified == asked and not result.match_failures
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
