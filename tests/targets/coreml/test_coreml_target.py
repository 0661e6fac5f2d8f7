"""Core ML packages as they are built here: numbers, names, types, ranges, files, what the manifest says, what is refused."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import coremltools
import numpy as np
import pytest

import sam3x
from sam3x import api
from sam3x.errors import LoweringError, SpecError, TargetUnavailableError
from sam3x.pipeline import export_pipeline
from sam3x.pipeline.compatibility import WITH_CLICKS
from sam3x.sources.image import module_image_source, random_image_source
from sam3x.sources.names import COMPONENTS
from sam3x.targets.coreml import target as coreml
from sam3x.targets.coreml.target import CoreMlTarget
from support.core_ml import Evaluated
from support.folders import MadeOnce
from support.transformers_model import tiny_video
from support.upstream import encoder_of

NO_MAC = pytest.mark.skipif(sys.platform == "darwin", reason="Core ML runs here")


@pytest.fixture(scope="module")
def artifact(made_once: MadeOnce) -> sam3x.Artifact:
    def write(folder: Path) -> None:
        sam3x.export(encoder_of(2), target="coreml", output=folder, tokens=36)

    return sam3x.load(made_once("coreml", write))


def described(artifact: sam3x.Artifact) -> Any:
    return coremltools.models.MLModel(str(artifact.path.parent), skip_model_load=True).get_spec().description


@NO_MAC
def test_every_branch_is_in_the_package_and_it_is_said_to_be_unverified(artifact: sam3x.Artifact) -> None:
    manifest = artifact.manifest
    assert not manifest.verified and str(manifest.verified_reason).startswith("Core ML runs on Apple's systems")
    assert manifest.input_names == ("tgt", "memory", "memory_key_padding_mask", "query_pos", "dac", "pre_norm")
    with pytest.raises(TargetUnavailableError, match="Core ML runs on Apple's systems"):
        artifact.run(_inputs())


def _inputs() -> dict[str, Any]:
    zeros = {name: np.zeros((2, 36, 32), np.float32) for name in ("tgt", "query_pos")}
    mask = np.zeros((2, 5), bool)
    return {**zeros, "memory": np.zeros((2, 5, 32), np.float32), "memory_key_padding_mask": mask, "dac": True, "pre_norm": True}


def test_names_and_ranges_are_those_of_the_request(artifact: sam3x.Artifact) -> None:
    found = described(artifact)
    assert tuple(item.name for item in found.input) == artifact.manifest.input_names
    assert tuple(item.name for item in found.output) == artifact.manifest.output_names
    arrays = {item.name: item.type.multiArrayType for item in found.input}
    ranges = [(item.lowerBound, item.upperBound) for item in arrays["memory"].shapeRange.sizeRanges]
    assert ranges == [(1, 2), (1, 77), (32, 32)] and list(arrays["memory"].shape) == [1, 1, 32]
    assert list(arrays["dac"].shape) == [1]


def test_every_file_of_the_package_has_a_hash(artifact: sam3x.Artifact) -> None:
    package = "fusion_encoder.mlpackage"
    assert artifact.manifest.encoder.file == f"{package}/Manifest.json"
    assert len(artifact.manifest.files) == 3 and all(name.startswith(f"{package}/") for name in artifact.manifest.files)
    weights = sum(parameter.nbytes for parameter in encoder_of(2).layers.parameters())
    assert (artifact.path.parent / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size < 1.3 * weights


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Mac, with coremltools' own definition of each operation in place of Core ML."""
    monkeypatch.setattr(coreml, "_runs", lambda: True)
    monkeypatch.setattr(coreml, "_open", Evaluated)


@pytest.mark.usefixtures("evaluated")
def test_every_branch_gives_what_eager_gives(artifact: sam3x.Artifact, tmp_path: Path) -> None:
    shutil.copytree(artifact.path.parents[1], tmp_path / "out")
    records = api.verify(tmp_path / "out", encoder_of(2))
    assert len({record.branch for record in records}) == 4 and all(record.passed for record in records)


@pytest.mark.long
@pytest.mark.usefixtures("evaluated")
def test_half_of_a_batch_that_the_run_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing stays in the temporary folder, where coremltools keeps each package until the process ends."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(coreml, "_open", lambda package: (kept.append(list(temporary.iterdir())), Evaluated(package))[1])
    kept: list[Any] = []
    options: dict[str, Any] = {"dac": True, "pre_norm": True, "batch": (2, 6), "tokens": 36}
    artifact = sam3x.export(encoder_of(1), target="coreml", output=tmp_path / "out", **options)
    assert artifact.manifest.verified and kept == [[]]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"fusion_encoder.mlpackage", "manifest.json"}


@pytest.mark.usefixtures("evaluated")
@pytest.mark.parametrize(
    "name", [name if name == "mask_head" else pytest.param(name, marks=pytest.mark.long) for name in COMPONENTS]
)
def test_a_component_gives_what_eager_gives(name: str, tmp_path: Path) -> None:
    source = random_image_source(WITH_CLICKS)
    manifest = export_pipeline(source, target="coreml", output=tmp_path / "out", components=[name])
    (item,) = manifest.components
    assert item.file == f"{name}.mlpackage/Manifest.json" and (tmp_path / "out" / item.file).is_file()
    assert manifest.verified and item.verification


@pytest.mark.long
@pytest.mark.usefixtures("evaluated")
@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_of_transformers_gives_what_eager_gives(name: str, tmp_path: Path) -> None:
    source = module_image_source(tiny_video())
    assert export_pipeline(source, target="coreml", output=tmp_path / "out", components=[name]).verified


def test_the_runner_gives_core_ml_what_it_takes(artifact: sam3x.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bool, no rank 0; what runs it is there on a Mac alone."""
    given: dict[str, np.ndarray] = {}
    description = described(artifact)

    class Model:
        def __init__(self, path: str) -> None:
            assert path.endswith("fusion_encoder.mlpackage")

        def get_spec(self) -> Any:
            return SimpleNamespace(description=description)

        def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            given.update(inputs)
            return {"output": inputs["tgt"]}

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(coremltools.models, "MLModel", Model)
    outputs = CoreMlTarget().load_runner(artifact.path).run({name: np.asarray(value) for name, value in _inputs().items()})
    assert outputs["output"].shape == (2, 36, 32)
    assert {value.dtype for value in given.values()} == {np.dtype(np.float32)} and given["dac"].shape == (1,)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_another_precision_is_refused(precision: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"precision.*fp32"):
        sam3x.export(target="coreml", output=tmp_path / "out", precision=precision)
    assert not (tmp_path / "out").exists()


def test_without_coremltools_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "coremltools" else found(name, *rest))
    with pytest.raises(TargetUnavailableError, match=r'missing coremltools\. Install it: pip install "sam3x\[coreml\]"'):
        sam3x.export(encoder_of(1), target="coreml", output=tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "fact"),
    [
        (
            NotImplementedError("a log\nop 'foo' not implemented."),
            r"NotImplementedError: op 'foo' not implemented\.",
        ),
        (AssertionError(), r"AssertionError \(in group_norm\)"),
    ],
)
def test_what_coremltools_does_not_convert_is_one_sentence(
    error: Exception, fact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def group_norm(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(coremltools, "convert", group_norm)
    with pytest.raises(LoweringError, match=f"coremltools cannot convert the graph: {fact}"):
        sam3x.export(encoder_of(1), target="coreml", output=tmp_path / "out", tokens=36, dac=False, pre_norm=True)
    assert not (tmp_path / "out").exists()
