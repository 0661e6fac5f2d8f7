"""Checkpoints of image models: sizes out of shapes, lint, and the command lines around them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from sam3x.cli.app import app
from sam3x.sources.checkpoint import read_checkpoint
from sam3x.sources.image import load_judged
from sam3x.sources.lint import judge, lint
from sam3x.sources.state import config_of, image_part
from support.image_model import TINY


@pytest.fixture(scope="module")
def state(tiny_model: nn.Module) -> dict[str, Tensor]:
    """As Meta saves it: the image model under ``detector.``, a tracker beside it."""
    weights = {f"detector.{name}": value for name, value in tiny_model.state_dict().items()}
    return {**weights, "tracker.no_mem_embed": torch.zeros(1, 1, 8)}


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"model": state}, path)
    return path


def test_the_shapes_tell_the_architecture(state: dict[str, Tensor], tmp_path: Path) -> None:
    model = load_judged(judge(read_checkpoint(saved(tmp_path / "sam3.pt", state))))
    config = config_of(image_part(state).state, "sam3.pt")
    tiny = TINY.model_copy(update={"interactive": True})
    assert config.model_copy(update={"text_heads": TINY.text_heads}) == tiny  # heads of the text encoder leave no trace
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name.removeprefix("detector.")], value) for name, value in state.items() if name in loaded)


def test_lint_of_a_sound_checkpoint(state: dict[str, Tensor], tmp_path: Path) -> None:
    report = lint(saved(tmp_path / "sam3.pt", state))
    assert report.clean and report.kind == "SAM3" and report.exports == ("image model", "interactive head", "fusion encoder")
    assert report.metadata["picture"].startswith("112 pixels") and report.metadata["context length"] == "16 tokens"
    done = CliRunner().invoke(app, ["lint", str(tmp_path / "sam3.pt")])
    assert done.exit_code == 0 and "nothing wrong" in done.stdout and "left out" in done.stdout


def test_lint_of_what_cannot_be_exported_ends_with_status_1(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pt", {name: value for name, value in state.items() if "transformer.decoder." not in name})
    done = CliRunner().invoke(app, ["lint", str(path), "--json"])
    assert done.exit_code == 1 and "nothing under 'transformer.decoder.'" in str(json.loads(done.stdout)["traps"])
    assert "not fit for an export" in CliRunner().invoke(app, ["lint", str(path)]).stdout


def test_weights_key_on_the_command_line(state: dict[str, Tensor], tmp_path: Path) -> None:
    ema = {name: value if value.is_complex() else value * 2 for name, value in state.items()}
    torch.save({"model": state, "ema": ema}, tmp_path / "c.pt")
    done = CliRunner().invoke(app, ["lint", str(tmp_path / "c.pt"), "--weights-key", "ema"])
    assert done.exit_code == 0 and "weights under 'ema'" in done.stdout
    words = ["--checkpoint", str(tmp_path / "c.pt"), "--weights-key", "ema", "--batch", "2", "--tokens", "16", "--dac", "off"]
    words += ["--prompt-length", "4", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["export", *words, "--pre-norm", "on", "--json"])
    assert done.exit_code == 0, done.stderr
    assert "weights under 'ema'" in json.loads(done.stdout)["origin"]
    verify = ["verify", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "c.pt"), "-q"]
    assert CliRunner().invoke(app, verify).exit_code == 2  # those under 'model' are other weights
    assert CliRunner().invoke(app, [*verify, "--weights-key", "ema"]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["export", "--tokenizer", "x"], "belong to --pipeline"),
        (["export", "--pipeline", "--tokens", "64"], "--tokens belong to a fusion encoder alone"),
        (["export", "--pipeline", "--target", "nowhere"], "nowhere"),
        (["export", "--pipeline", "--layout", "triton", "--fuse"], "asks the components one by one"),
        (["export", "--pipeline", "--source", "transformers"], "--source transformers takes --checkpoint FOLDER"),
        (["export", "--pipeline", "--source", "sam3", "--checkpoint", "."], "is a folder"),
        (["run", ".", "none.jpg"], "Give --text, --ids, --box, --point or --everything"),
        (["run", ".", "none.jpg", "--box", "1,2,3"], "expected X0,Y0,X1,Y1"),
        (["run", ".", "none.jpg", "--text", "a", "-o", "no/folder.png"], "cannot be written"),
        (["lint", "none.pt"], "does not exist"),
        (["export", "--weights-key", "ema"], "--weights-key chooses among the weights of one file"),
        (["export", "--pipeline", "--checkpoint", ".", "--weights-key", "ema"], "--weights-key chooses among the weights"),
    ],
)
def test_bad_command_lines(arguments: list[str], fact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and fact in done.stderr.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []
