"""Manifests that an earlier sam3x wrote are read, checked and run as ever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import sam3x
from sam3x.artifact.artifact import load_any
from sam3x.artifact.manifest import MANIFEST, _seal_of
from sam3x.errors import ArtifactError
from support.command_line import run


def write_schema_2(folder: Path, values: dict[str, Any]) -> None:
    values = {**values, "schema_version": 2}
    (folder / MANIFEST).write_text(json.dumps({**values, "manifest_sha256": _seal_of(values)}))


@pytest.fixture
def folder(default_artifact: Path, tmp_path: Path) -> Path:
    """``default_artifact`` as schema 2 had it: one component's fields beside those of the export."""
    shutil.copytree(default_artifact, tmp_path / "out")
    values = json.loads((default_artifact / MANIFEST).read_text())
    (component,) = values.pop("components")
    del values["kind"]
    names = ("inputs", "outputs", "ranges", "verification")
    values |= {name: component[name] for name in names}
    values |= {"facts": component["metadata"], "figures": values.pop("metrics")}
    values["passes"] = [{"missed": record.pop("match_failures"), **record} for record in component["passes"]]
    values |= {f"{name}_names": [item["name"] for item in component[f"{name}s"]] for name in ("input", "output")}
    write_schema_2(tmp_path / "out", {**values, "interface": "tokens"})
    return tmp_path / "out"


def test_an_encoder_of_schema_2_is_an_encoder(folder: Path, default_artifact: Path) -> None:
    old, new = sam3x.load(folder), sam3x.load(default_artifact)
    assert old.path == folder / "fusion_encoder.onnx" and old.manifest.input_names == new.manifest.input_names
    for name in ("inputs", "outputs", "ranges", "passes", "verification", "interface", "spec", "metadata", "metrics"):
        assert getattr(old.manifest, name) == getattr(new.manifest, name), name
    assert run("inspect", folder).exit_code == 0
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace("onnx", "pte"))
    with pytest.raises(ArtifactError, match="changed after the export"):
        sam3x.load(folder)


def test_a_pipeline_of_schema_2_is_a_pipeline(tiny_pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pipeline, tmp_path / "out")
    write_schema_2(tmp_path / "out", json.loads((tiny_pipeline / MANIFEST).read_text()))
    old, new = load_any(tmp_path / "out"), load_any(tiny_pipeline)
    assert old.components == new.components and old.kind == "pipeline"


def test_a_precision_of_schema_3_is_that_of_the_weights(default_artifact: Path, tmp_path: Path) -> None:
    """What ONNX called ``precision`` until schema 4; ExecuTorch's and TensorRT's was arithmetic then too."""
    shutil.copytree(default_artifact, tmp_path / "out")
    values = json.loads((default_artifact / MANIFEST).read_text())
    del values["target_options"]["weights"]
    for target, weights in (("onnx", "int8"), ("pte", None)):
        old = {**values, "schema_version": 3, "target": target}
        old["target_options"] = {**values["target_options"], "precision": "int8"}
        (tmp_path / "out" / MANIFEST).write_text(json.dumps({**old, "manifest_sha256": _seal_of(old)}))
        options = load_any(tmp_path / "out").target_options
        assert options["precision"] == ("fp32" if weights else "int8") and options.get("weights") == weights


def test_what_schema_2_never_was_is_told(folder: Path) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    for change in ({"files": {}}, {"inputs": 3}, {"passes": [{}]}, {"files": None}):
        write_schema_2(folder, {**values, **change})
        with pytest.raises(ArtifactError, match="no sam3x manifest"):
            sam3x.load(folder)
