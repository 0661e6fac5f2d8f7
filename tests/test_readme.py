"""README's and the walk-through's commands run in small: a tiny checkpoint, encoder and photograph bear the names they use."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from support.npm import lacking_npm

ROOT = Path(__file__).parents[1]
SOURCES = ("--checkpoint", "--module", "--pipeline")


def commands(page: str) -> list[list[str]]:
    """The words of every ``sam3x`` line in a page's blocks of commands, comments left out."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for language, block in fenced if not language for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("sam3x ")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the pages' commands find where they run."""
    import torch

    from support.image_model import photograph, tiny_image_model, write_vocabulary

    vocabulary = write_vocabulary(tmp_path / "bpe_simple_vocab_16e6.txt.gz")
    state = tiny_image_model(vocabulary).state_dict()
    torch.save({"model": {f"detector.{name}": value for name, value in state.items()}}, tmp_path / "sam3.pt")
    photograph().save(tmp_path / "photo.jpg")
    (tmp_path / "photos").mkdir()
    for name in ("one.jpg", "two.jpg"):
        photograph().save(tmp_path / "photos" / name)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "mod.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from support.upstream import encoder_of\n"
        "def factory():\n    return encoder_of(1, d_model=32, num_heads=4, dim_feedforward=64)\n"
    )
    return tmp_path


def run(words: list[str], folder: Path) -> None:
    """Run one command with the encoder of ``folder`` in place of the default one."""
    verb = words[1]
    if (verb == "export" and not set(SOURCES) & set(words)) or (
        verb in ("verify", "doctor", "bench") and "sam3.pt" not in words
    ):
        words = [*words, "--module", "package.mod:factory"]
    if verb == "bench":
        shutil.copytree(folder / "out", folder / "other", dirs_exist_ok=True)
        words = [*words, "--repeat", "2"]
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", *words], cwd=folder, capture_output=True, text=True)
    absent = lacking(words)
    said = f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert done.returncode == (0 if absent is None else 2) and (absent is None or absent in done.stderr), said


def lacking(words: list[str]) -> str | None:
    """What the refusal names where this machine lacks what a command needs."""
    if "cuda" in words and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "pip install onnxruntime-gpu"
    return "npm" if words[1] == "web" and lacking_npm() else None


@pytest.mark.long
@pytest.mark.parametrize("page", ["README.md", "docs/walkthrough-model.md"])
def test_every_command_of_the_page_runs(page: str, folder: Path) -> None:
    found = commands(page)
    assert {words[1] for words in found} >= {"export", "run", "inspect"}
    for words in found:
        run(words, folder)
