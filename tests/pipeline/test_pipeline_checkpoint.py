"""Checkpoints of image models: sizes out of shapes, lint, and the command lines around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from sam3x.cli.app import app
from sam3x.errors import SourceError
from sam3x.sources.image import load_image_weights
from sam3x.sources.image_model import build_image_model
from sam3x.sources.lint import lint
from sam3x.sources.state import config_of, detector_keys
from support.image_model import TINY


@pytest.fixture(scope="module")
def state(tiny_model: nn.Module) -> dict[str, Tensor]:
    """As Meta saves it: the image model under ``detector.``, a tracker beside it."""
    weights = {f"detector.{name}": value for name, value in tiny_model.state_dict().items()}
    return {**weights, "tracker.no_mem_embed": torch.zeros(1, 1, 8)}


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"model": state}, path)
    return path


def test_the_shapes_tell_the_architecture(state: dict[str, Tensor]) -> None:
    config = config_of(detector_keys(state), "it")
    assert config.model_copy(update={"text_heads": TINY.text_heads}) == TINY  # heads of the text encoder leave no trace
    model = build_image_model(config, device="meta")
    load_image_weights(model, detector_keys(state), "it")
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in detector_keys(state).items())


def test_lint_of_a_sound_checkpoint(state: dict[str, Tensor], tmp_path: Path) -> None:
    report = lint(saved(tmp_path / "sam3.pt", state))
    assert report.clean and report.kind == "SAM3" and not report.unexpected
    assert report.facts["picture"].startswith("112 pixels") and report.facts["context length"] == "16 tokens"
    done = CliRunner().invoke(app, ["lint", str(tmp_path / "sam3.pt")])
    assert done.exit_code == 0 and "nothing wrong" in done.stdout


def without(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if part not in name}


BROKEN: dict[str, Any] = {
    "missing": (lambda s: without(s, "decoder.layers.1.linear2.bias"), "missing", "transformer.decoder.layers.1.linear2.bias"),
    "geometry": (lambda s: without(s, "geometry_encoder."), "traps", "random weights"),
    "shape": (
        lambda s: {**s, "detector.dot_prod_scoring.hs_proj.bias": torch.zeros(5)},
        "misshaped",
        "dot_prod_scoring.hs_proj.bias (5,), not (32,)",
    ),
    "nan": (
        lambda s: {**s, "detector.dot_prod_scoring.hs_proj.bias": torch.full((32,), float("nan"))},
        "not_finite",
        "dot_prod_scoring.hs_proj.bias",
    ),
    "teacher": (
        lambda s: {**s, "detector.backbone.vision_backbone.trunk.student_trunk.stem.weight": torch.zeros(4)},
        "traps",
        "both a student's trunk",
    ),
    "unknown": (lambda s: {"a.b": torch.zeros(3)}, "kind", "unknown"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_lint_names_what_is_wrong(name: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    change, field, fact = BROKEN[name]
    path = saved(tmp_path / "broken.pt", change(state))
    done = CliRunner().invoke(app, ["lint", str(path), "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == 1 and fact in str(report[field])
    if name in ("missing", "shape", "nan"):
        model = build_image_model(config_of(detector_keys(state), "it"), device="meta")
        with pytest.raises(SourceError, match="does not fit"):
            load_image_weights(model, detector_keys(change(state)), "it")


def test_a_transformers_checkpoint_is_known(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt", {"detector_model.detr_encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)})
    assert lint(path).kind == "transformers"


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["export", "--tokenizer", "x"], "belong to --pipeline"),
        (["export", "--pipeline", "--tokens", "64"], "--tokens belong to a fusion encoder alone"),
        (["export", "--pipeline", "--target", "nowhere"], "nowhere"),
        (["export", "--pipeline", "--layout", "triton"], "a pipeline has six"),
        (["export", "--pipeline", "--source", "transformers"], "--source transformers takes --checkpoint FOLDER"),
        (["export", "--pipeline", "--source", "sam3", "--checkpoint", "."], "is a folder"),
        (["run", ".", "none.jpg"], "Give --text or --box"),
        (["run", ".", "none.jpg", "--box", "1,2,3"], "expected X0,Y0,X1,Y1"),
        (["run", ".", "none.jpg", "--text", "a", "-o", "no/folder.png"], "cannot be written"),
        (["lint", "none.pt"], "does not exist"),
    ],
)
def test_bad_command_lines(arguments: list[str], fact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and fact in done.stderr.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []
