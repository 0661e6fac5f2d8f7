"""The command line on real folders: bad input leaves everything as it was; an artifact is written, inspected and verified."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sam3x.artifact.manifest import SCHEMA_VERSION
from support.command_line import run

SMALL_MODULE = """
from sam3x.fusion.config import FusionConfig
from sam3x.sources.encoder import build_encoder, draw_weights

def make():
    print("the factory prints")
    encoder = build_encoder(FusionConfig(d_model=32, num_layers=1, num_heads=4, dim_feedforward=64)).eval()
    draw_weights(encoder, seed=3)
    return encoder
"""


# ---- bad input: exit code 2, one message, nothing written

BAD_EXPORTS = {
    "unknown target": (["-t", "onx"], "Did you mean 'onnx'?"),
    "range upside down": (["--batch", "8:1"], "minimum 8 is above maximum 1"),
    "no range": (["--tokens", "many"], "expected N or MIN:MAX"),
    "dac over an odd batch": (["--dac", "on", "--batch", "3"], "odd size 3"),
    "dac without pre-norm": (["--dac", "on", "--pre-norm", "off"], "ignores dac"),
    "unknown input": (["--inputs", "tgt,memory,colour"], "'colour' is not an input"),
    "missing input": (["--inputs", "tgt"], "'memory' is required"),
    "unknown interface": (["--interface", "video"], "--interface"),
    "unknown switch": (["--dac", "maybe"], "--dac"),
    "dac dimension": (["--dac-dim", "2"], "--dac-dim"),
    "feature size": (["--interface", "feature-maps", "--feature-sizes", "72by72"], "expected HxW"),
    "empty feature size": (["--interface", "feature-maps", "--feature-sizes", "0x72"], "expected HxW"),
    "unknown option": (["--colour", "red"], "--colour"),
    "two encoders": (["--checkpoint", "a.pt", "--module", "a:b"], "Give one of them"),
    "missing checkpoint": (["--checkpoint", "missing.pt"], "missing.pt"),
    "corrupt checkpoint": (["--checkpoint", "corrupt.pt"], "corrupt.pt"),
    "empty checkpoint": (["--checkpoint", "empty.safetensors"], "empty.safetensors"),
    "keys of another model": (["--checkpoint", "other.pt"], "other.pt"),
    "pickle with code": (["--checkpoint", "code.pt"], "code.pt"),
    "no factory name": (["--module", "small"], "small"),
    "no such module": (["--module", "nowhere:make"], "nowhere"),
    "no such factory": (["--module", "small:nothing"], "nothing"),
    "no fusion encoder": (["--module", "torch.nn:Identity"], "Identity is no fusion encoder"),
    "unknown pass": (["--disable-pass", "fuse_everything"], "fuse_everything"),
    "output is a file": (["-o", "small.py"], "small.py"),
    "output under a file": (["-o", "small.py/out"], "cannot be written"),
    "refused after staging": (["--module", "small:odd", "-o", "new/folder/out"], "d_model"),
}


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with good and bad sources in it."""
    odd = "\nclass Odd(torch.nn.Linear):\n    def forward(self, tgt, memory): return tgt\n\nodd = lambda: Odd(8, 8)\n"
    (tmp_path / "small.py").write_text(
        f"import torch\n{SMALL_MODULE}{odd.replace('return tgt', 'return super().forward(tgt)')}"
    )
    (tmp_path / "corrupt.pt").write_bytes(b"PK\x03\x04" + bytes(range(200)))
    (tmp_path / "empty.safetensors").touch()
    torch.save({"model": {"backbone.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"model": Bomb()}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "small", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("case", BAD_EXPORTS)
def test_bad_exports(case: str, workplace: Path) -> None:
    arguments, fact = BAD_EXPORTS[case]
    before = contents(workplace)
    result = run("export", *arguments)
    assert result.exit_code == 2, (result.exit_code, result.stderr, result.exception)
    assert fact in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""
    assert contents(workplace) == before


def test_an_earlier_export_survives_a_failed_one(workplace: Path) -> None:
    (workplace / "out").mkdir()
    (workplace / "out" / "fusion_encoder.onnx").write_text("earlier")
    before = contents(workplace)
    assert run("export", "--checkpoint", "corrupt.pt").exit_code == 2
    assert run("export", "--module", "small:odd").exit_code == 2
    assert contents(workplace) == before


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize("damage", ["no folder", "no manifest", "no json", "other schema", "edited file", "missing file"])
def test_bad_folders(command: str, damage: str, default_artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    if damage != "no folder":
        shutil.copytree(default_artifact, folder)
    manifest, graph = folder / "manifest.json", folder / "fusion_encoder.onnx"
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "no json":
        manifest.write_text("{")
    elif damage == "other schema":
        manifest.write_text(manifest.read_text().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99'))
    elif damage == "edited file":
        graph.write_bytes(graph.read_bytes() + b"\0")
    elif damage == "missing file":
        graph.unlink()
    result = run(command, folder)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("sam3x: load: ")
    assert "99" in result.stderr if damage == "other schema" else str(folder) in result.stderr


def test_a_command_that_is_none() -> None:
    assert run("exprot").exit_code == 2


# ---- on a real artifact


def test_inspect_and_verify_a_real_artifact(default_artifact: Path, workplace: Path) -> None:
    (component,) = json.loads(run("inspect", default_artifact, "--json").stdout)["components"]
    assert [item["name"] for item in component["outputs"]] == ["output"]
    shown = run("inspect", default_artifact).stdout
    assert all(item["name"] in shown for item in component["inputs"])
    result = run("verify", default_artifact, "--module", "small:make", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["passed"] and len({record["branch"] for record in document["records"]}) == 4
    assert "dac=True pre_norm=False" in run("verify", default_artifact, "--module", "small:make").stdout
    wrong = run("verify", default_artifact)  # the seeded default has other weights
    assert wrong.exit_code == 2 and "other weights" in wrong.stderr


def test_export_from_the_command_line(workplace: Path) -> None:
    result = run("export", "--module", "small:make", "-o", "out", "--json", "--batch", "2", "--pre-norm", "module")
    assert result.exit_code == 0, result.stderr
    (component,) = json.loads(result.stdout)["components"]
    assert component["ranges"]["batch"] == [2, 2] and "pre_norm" not in {item["name"] for item in component["inputs"]}
    assert sorted(path.name for path in (workplace / "out").iterdir()) == ["fusion_encoder.onnx", "manifest.json"]
