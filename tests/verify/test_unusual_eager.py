"""Encoders whose eager run has no number in places, or no float64, exported as a user would."""

from __future__ import annotations

from collections.abc import Callable
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


@torch.jit.script
def scripted(scores: Tensor, value: Tensor) -> Tensor:
    return scores.to(torch.float32).softmax(-1) @ value


def cast(scores: Tensor, value: Tensor) -> Tensor:
    """A cast that nothing outside of TorchScript can widen."""
    return scripted(scores, value)


def checked(scores: Tensor, value: Tensor) -> Tensor:
    """A check like those of kernels that are written for one type."""
    if scores.dtype is not torch.float32:
        raise TypeError(f"expected float32, got {scores.dtype}")
    return scores.softmax(-1) @ value


class Own(nn.Module):
    """A layer whose attention is a function of scores and values."""

    def __init__(self, attend: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.d_model, self.pre_norm, self.attend = 16, True, attend
        self.value = nn.Linear(16, 16)

    def forward(self, tgt: Tensor, memory: Tensor, **_: object) -> Tensor:
        return tgt + self.attend(tgt @ memory.transpose(1, 2) / 4, self.value(memory))


@pytest.mark.parametrize("attend", [cast, checked], ids=lambda item: item.__name__)
def test_code_that_has_no_float64_is_judged_by_float32_alone_and_the_manifest_says_so(
    attend: Callable[[Tensor, Tensor], Tensor], tmp_path: Path
) -> None:
    manifest = sam3x.export(Own(attend).eval(), output=tmp_path / "out", **FIXED).manifest
    assert all(record.passed and record.float32_alone and record.from_float64 is None for record in manifest.verification)
    (note,) = (note for note in manifest.notes if "float32 alone" in note)
    assert "Error" in note
