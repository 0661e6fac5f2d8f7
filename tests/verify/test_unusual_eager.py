"""Encoders whose eager run has no number in places, exported as a user would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sam3x
from sam3x.errors import Step, VerificationError

FIXED = {"dac": False, "pre_norm": "module", "inputs": ("tgt", "memory"), "batch": 1, "tokens": 6, "prompt_length": 3}


class Attending(nn.Module):
    """A layer of one attention, whose weights are asked for and not used; query 1 and 4 are hidden from every key."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.d_model = 16
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.pre_norm = True

    def forward(self, tgt: Tensor, memory: Tensor, **_: object) -> Tensor:
        query = torch.arange(tgt.shape[1])[:, None] % 3 == 1
        hidden = query.expand(tgt.shape[1], memory.shape[1])
        return tgt + self.attention(tgt, memory, memory, attn_mask=hidden, need_weights=True)[0]


def test_rows_that_are_wholly_hidden_are_named_where_eager_has_no_number(tmp_path: Path) -> None:
    with pytest.raises(VerificationError) as failed:
        sam3x.export(Attending().eval(), output=tmp_path / "out", **FIXED)
    assert failed.value.step is Step.VERIFY
    said = "output 'output' has 32 undefined values (NaN) in eager itself, the first at [0, 1, 0]"
    assert said in failed.value.fact and not (tmp_path / "out").exists()
