"""``sam3x demo``, ``--demo`` and the picture that is shown."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sam3x.demo import WEIGHTS
from support.command_line import run

SHOWN = """
import sys
from pathlib import Path
from sam3x.demo import show
from sam3x.runtime.segmenter import Segmenter
picture = show.scene()
with Segmenter(sys.argv[1]) as segmenter:
    found = show.answers(segmenter, picture)
show.write(show.sheet(found), Path(sys.argv[2]))
for asked, result in found:
    print(asked, len(result), sep="|")
assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_the_picture_is_drawn_without_torch_and_shows_right_answers(demo_pipeline: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHOWN, str(demo_pipeline), str(tmp_path / "demo.png")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    counts = dict(line.split("|") for line in done.stdout.splitlines())
    assert list(counts.values()) == ["2", "2", "2", "0", "2", "1"], counts
    assert Image.open(tmp_path / "demo.png").size == (3 * 288 + 12, 2 * (288 + 22) + 6)
    assert (tmp_path / "demo.png").stat().st_size < 200_000


def test_demo_names_the_model_alone(tmp_path: Path) -> None:
    for arguments, fact in (
        (("export", "--pipeline", "--demo", "--checkpoint", "sam3.pt"), "--checkpoint and --demo each name the model"),
        (("export", "--pipeline", "--demo", "--module", "a:b"), "--module and --demo each name the model"),
        (("export", "--demo"), "belong to --pipeline"),
    ):
        done = run(*arguments, "-o", tmp_path / "out")
        assert done.exit_code == 2 and fact in done.stderr and not (tmp_path / "out").exists()


def test_what_was_exported_is_verified_again(demo_pipeline: Path) -> None:
    assert run("verify", demo_pipeline, "--demo", "-q").exit_code == 0


def test_what_the_demo_cannot_do_is_told_before_it_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo.png").write_text("mine")
    for output, fact in (
        (tmp_path, "demo.png would be overwritten, and no demo wrote it"),
        (tmp_path / "demo.png", "demo.png cannot be written"),
        (tmp_path / "demo.png" / "out", "is a file"),
    ):
        done = run("demo", "-o", output)
        assert done.exit_code == 2 and fact in done.stderr.replace("\n", ""), done.stderr
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("transformers", "onnx") else found(name))
    done = run("demo", "-o", tmp_path / "out")
    assert done.exit_code == 2 and 'needs transformers, onnx. Install it: pip install "sam3x[onnx,' in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"] and (tmp_path / "demo.png").read_text() == "mine"


@pytest.mark.long
def test_the_command_writes_pipeline_and_pictures(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "sam3x", "demo", "-o", str(tmp_path / "out")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert '"red circle": 2 found' in done.stdout and '"dog": nothing found' in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"demo", "demo.png", "demo-scene.png"}
    again = run("run", tmp_path / "out" / "demo", tmp_path / "out" / "demo-scene.png", "--text", "green triangle")
    assert again.exit_code == 0 and "green triangle" in again.stdout and "nothing found" not in again.stdout


def test_the_weights_are_a_folder_of_transformers() -> None:
    assert {path.name for path in WEIGHTS.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert run("lint", WEIGHTS).exit_code == 0
