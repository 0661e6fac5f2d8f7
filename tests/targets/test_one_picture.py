"""With one picture dac cannot be on: it halves the batch. Every target is told, and the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sam3x
from sam3x.errors import SpecError
from sam3x.spec import make_spec
from support.command_line import run


@pytest.mark.parametrize(
    ("options", "odd"),
    [
        ({"batch": 1}, "batch is fixed at the odd size 1"),
        ({"batch": 3, "dac": "runtime"}, "batch is fixed at the odd size 3"),
        ({"dac_dim": 1, "tokens": 25}, "tokens is fixed at the odd size 25"),
        ({"dac_dim": 1, "interface": "feature_maps", "feature_sizes": ((5, 5),)}, "tokens is fixed at the odd size 25"),
    ],
    ids=str,
)
def test_where_dac_cannot_be_on_it_is_fixed_off_and_said(options: dict[str, Any], odd: str) -> None:
    spec = make_spec(**options)
    assert spec.dac is False and odd in spec.notes[0]
    assert make_spec(**spec.model_dump()).dac is False  # as from a manifest
    with pytest.raises(SpecError, match=odd):
        make_spec(**{**options, "dac": True})


@pytest.mark.parametrize(
    "options", [{"dac": False, "batch": 1}, {"batch": (1, 2)}, {"batch": 4}, {"dac_dim": 1, "batch": 1}], ids=str
)
def test_where_it_can_or_is_off_already_nothing_is_said(options: dict[str, Any]) -> None:
    spec = make_spec(**options)
    assert spec.dac == options.get("dac", "runtime") and spec.notes == ()


FACTORY = """
from sam3x.fusion.config import FusionConfig
from sam3x.sources.encoder import build_encoder, draw_weights

def make():
    encoder = build_encoder(FusionConfig(d_model=32, num_layers=1, num_heads=4, dim_feedforward=64)).eval()
    draw_weights(encoder, seed=3)
    return encoder
"""


@pytest.mark.parametrize(
    ("target", "more"),
    [("onnx", []), ("pte", []), ("pte", ["--branches", "cond", "--pre-norm", "on"]), ("trt", ["--compute-capability", "sm89"])],
    ids=str,
)
def test_one_picture_exports_to_every_target_with_dac_off_and_says_so(
    target: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ExecuTorch refused it: "6 conditionals are left … make the flags data flow", which they were."""
    (tmp_path / "one_picture.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--batch", "1", "--tokens", "20", "--prompt-length", "5", "--module", "one_picture:make", *more]
    done = run("export", "-t", target, *words, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    said = "dac is fixed off: it halves the batch, and the batch is fixed at the odd size 1"
    assert said in " ".join(done.output.split())
    manifest = sam3x.load(tmp_path / "out").manifest
    assert said in manifest.notes and "dac" not in manifest.input_names and manifest.spec["dac"] is False
