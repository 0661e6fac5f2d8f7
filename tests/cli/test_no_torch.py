"""An ONNX artifact runs in an environment without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sam3x.targets.registry import built_in_names

ROOT = Path(__file__).parents[2]

RUN = """
import importlib.util, json, sys
import numpy as np
assert importlib.util.find_spec("torch") is None
import sam3x
artifact = sam3x.load(sys.argv[1])
generator = np.random.default_rng(0)
batch, tokens, prompt = 4, 37, 7
results = {}
for dac in (False, True):
    for pre_norm in (False, True):
        outputs = artifact.run({
            "tgt": generator.standard_normal((batch, tokens, 32), dtype=np.float32),
            "memory": generator.standard_normal((batch, prompt, 32), dtype=np.float32),
            "memory_key_padding_mask": np.zeros((batch, prompt), dtype=bool),
            "query_pos": generator.standard_normal((batch, tokens, 32), dtype=np.float32),
            "dac": dac,
            "pre_norm": pre_norm,
        })
        assert np.isfinite(outputs["output"]).all()
        results[f"{dac} {pre_norm}"] = list(outputs["output"].shape)
assert "torch" not in sys.modules
print(json.dumps(results))
"""


def checked(*command: str | Path, **options: object) -> str:
    done = subprocess.run([str(item) for item in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment with sam3x and its ``runtime`` extra."""
    folder = tmp_path_factory.mktemp("no_torch")
    tree = folder / "tree"  # a copy: building leaves files beside the sources
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("exporter", "passes", "targets"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    checked(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    checked(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{tree}[runtime]")
    return python


@pytest.mark.long
def test_an_artifact_runs_without_torch(bare_python: Path, default_artifact: Path, tmp_path: Path) -> None:
    results = json.loads(checked(bare_python, "-c", RUN, default_artifact, cwd=tmp_path))
    assert results == {f"{dac} {pre}": [4, 37, 32] for dac in (False, True) for pre in (False, True)}


@pytest.mark.long
def test_the_command_line_without_torch(bare_python: Path, default_artifact: Path, tmp_path: Path) -> None:
    assert "fusion_encoder.onnx" in checked(bare_python, "-m", "sam3x", "inspect", default_artifact, cwd=tmp_path)
    targets = json.loads(checked(bare_python, "-m", "sam3x", "targets", "--json", cwd=tmp_path))
    assert [target["name"] for target in targets] == list(built_in_names())
    assert not any(target["available"] for target in targets) and "torch" in targets[0]["detail"]
    for command in (["export"], ["verify", str(default_artifact)]):
        done = subprocess.run([bare_python, "-m", "sam3x", *command], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and 'pip install "sam3x[onnx]"' in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_pipeline_runs_with_the_runtime_extra_alone(bare_python: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    from support.image_model import photograph

    photograph().save(tmp_path / "photo.jpg")
    options = ("--text", "dog", "--box", "60,80,300,390", "--threshold", "0", "-o", "drawn.png", "--json", "found.json")
    shown = checked(bare_python, "-m", "sam3x", "run", tiny_pipeline, "photo.jpg", *options, cwd=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["detections"]) == 12 and "12 found" in shown and (tmp_path / "drawn.png").stat().st_size
    assert "mask_head.onnx" in checked(bare_python, "-m", "sam3x", "inspect", tiny_pipeline, cwd=tmp_path)
