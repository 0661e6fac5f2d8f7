"""Targets that take no conditional say which are left, and the remedy that fits."""

from __future__ import annotations

from pathlib import Path

import pytest

import sam3x
from sam3x.errors import LoweringError
from support.strategies import EncoderCase
from support.upstream import encoder_of

TOKENS = ("tgt", "memory", "tgt_key_padding_mask")


@pytest.mark.parametrize("target", ["pte", "coreml"])
def test_a_size_that_dac_decides_is_told_with_what_helps(target: str, tmp_path: Path) -> None:
    """Found by the fuzz: a hand-written attention that asks ``any`` of all keys, half of which dac leaves out."""
    encoder = EncoderCase(styles=("scale_first", "grouped"), pre_norm=(True,)).build()
    options = {"pre_norm": True, "dac_dim": 1, "batch": 2, "tokens": (2, 40), "prompt_length": 5, "inputs": TOKENS}
    with pytest.raises(LoweringError, match=r"a size that dac decides is left.*--dac off"):
        sam3x.export(encoder, target=target, output=tmp_path / "out", dac="runtime", **options)
    assert not (tmp_path / "out").exists()
    assert sam3x.export(encoder, target=target, output=tmp_path / "out", dac=False, verify="off", **options)


@pytest.mark.parametrize("target", ["pte", "coreml"])
def test_any_of_the_keys_of_a_halved_batch_is_a_row_mask(target: str, tmp_path: Path) -> None:
    """A hand-written attention beside padding, dac an input of the run; found by the fuzz."""
    encoder = EncoderCase(styles=("scale_first",) * 2, pre_norm=(False,), positions=(True, True, False), seed=16).build()
    options = {"pre_norm": "module", "dac_dim": 0, "batch": (1, 8), "tokens": 6, "prompt_length": 5, "inputs": TOKENS}
    made = sam3x.export(encoder, target=target, output=tmp_path / "out", dac="runtime", **options)
    assert made.manifest.verified or target == "coreml"


def test_conditionals_that_were_asked_for_are_told_with_the_other_form(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"conditionals are left.*coremltools converts none.*--branches select"):
        sam3x.export(encoder_of(1), target="coreml", output=tmp_path / "out", branches="cond", tokens=20, verify="off")
