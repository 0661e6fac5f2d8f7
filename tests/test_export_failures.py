"""What goes wrong leaves nothing behind and says what, where and what next."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram

import sam3x
from sam3x import api
from sam3x.errors import ArtifactError, PassError, SourceError, SpecError, UnknownTargetError, VerificationError
from sam3x.passes.base import Pass, PassResult
from sam3x.passes.pipeline import PassPipeline
from sam3x.pipeline import job
from sam3x.sources import encoder as sources
from sam3x.targets.onnx.target import OnnxTarget
from support.folders import edit_manifest
from support.upstream import encoder_of


class WrongPass(Pass):
    """Adds a thousandth to the output."""

    name = "wrong"

    def call(self, program: ExportedProgram) -> PassResult:
        output = program.graph.output_node()
        value = output.args[0][0]
        with program.graph.inserting_before(output):
            moved = program.graph.call_function(torch.ops.aten.add.Tensor, (value, 1e-3))
        moved.meta = dict(value.meta)
        output.args = ((moved, *output.args[0][1:]),)
        return PassResult(rewrites=1)


@pytest.fixture
def wrong_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "default_pipeline", lambda _: PassPipeline((WrongPass(),)))


@pytest.mark.usefixtures("wrong_pipeline")
def test_a_wrong_artifact_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"branch dac=.* output 'output' is 1\.0e-03 from eager, allowed 2e-05"):
        sam3x.export(encoder_of(1), output=tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("wrong_pipeline")
def test_verify_each_names_the_pass(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"step 3/4 passes: 'wrong' after \[\]"):
        sam3x.export(encoder_of(1), output=tmp_path / "out", verify="each")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_survives_a_failure(default_artifact: Path, tmp_path: Path, wrong_pipeline: None) -> None:
    folder = tmp_path / "out"
    shutil.copytree(default_artifact, folder)
    (folder / "mine.txt").write_text("kept")
    before = {item.name: item.read_bytes() for item in folder.iterdir()}
    with pytest.raises(VerificationError):
        sam3x.export(encoder_of(1), output=folder)
    assert {item.name: item.read_bytes() for item in folder.iterdir()} == before
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    sam3x.export(encoder_of(1), output=folder, external_data=True, verify="off")
    assert (folder / "fusion_encoder.onnx.data").is_file()
    (folder / "mine.txt").write_text("kept")
    artifact = sam3x.export(encoder_of(1), output=folder, verify="off")
    assert sorted(item.name for item in folder.iterdir()) == ["fusion_encoder.onnx", "manifest.json", "mine.txt"]
    assert artifact.manifest.verified is False
    assert "off" in str(artifact.manifest.verified_reason)


class Broken(Pass):
    name = "broken"

    def call(self, program: ExportedProgram) -> PassResult:
        raise RuntimeError("boom")


def test_a_pass_that_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "default_pipeline", lambda _: PassPipeline((Broken(),)))
    with pytest.raises(PassError, match=r"'broken' failed after \[\]: RuntimeError: boom.*--disable-pass broken"):
        sam3x.export(encoder_of(1), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "fact"),
    [
        ({"target": "onx"}, UnknownTargetError, "Did you mean 'onnx'"),
        ({"batch": (4, 2)}, SpecError, "minimum 4 is above maximum 2"),
        ({"batch": 3, "dac": True}, SpecError, "odd size 3"),
        ({"atention": "x"}, SpecError, "no option of an export to onnx"),
        ({"disable_pass": ["nope"]}, SpecError, "no pass 'nope'"),
        ({"inputs": "tgt,memry"}, SpecError, "'memry' is not an input"),
    ],
    ids=str,
)
def test_bad_requests(options: dict[str, Any], error: type[Exception], fact: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=fact):
        sam3x.export(encoder_of(1), output=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_is_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no fusion encoder"):
        sam3x.export(torch.nn.Linear(2, 2), output=tmp_path / "out")
    with pytest.raises(SourceError, match=r"expected an nn\.Module"):
        sam3x.export("sam3.pt", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class TestLoading:
    """A folder is loaded only whole and unchanged, and run only on what it was exported for."""

    def test_a_changed_file(self, default_artifact: Path, tmp_path: Path) -> None:
        shutil.copytree(default_artifact, tmp_path / "out")
        path = tmp_path / "out" / "fusion_encoder.onnx"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with pytest.raises(ArtifactError, match="changed after the export"):
            sam3x.load(tmp_path / "out")

    def test_a_missing_file_and_no_manifest(self, default_artifact: Path, tmp_path: Path) -> None:
        shutil.copytree(default_artifact, tmp_path / "out")
        (tmp_path / "out" / "fusion_encoder.onnx").unlink()
        with pytest.raises(ArtifactError, match="is missing"):
            sam3x.load(tmp_path / "out")
        with pytest.raises(ArtifactError, match="cannot be read"):
            sam3x.load(tmp_path)

    def test_a_file_outside_the_folder(self, default_artifact: Path, tmp_path: Path) -> None:
        shutil.copytree(default_artifact, tmp_path / "out")
        edit_manifest(tmp_path / "out", seal=True, files=lambda files: {**files, "../secret": "00"})
        with pytest.raises(ArtifactError, match="outside"):
            sam3x.load(tmp_path / "out")

    @pytest.mark.parametrize(
        ("change", "fact"),
        [
            ({"tgt": np.zeros((2, 20, 32))}, "'tgt' has dtype float64, expected float32"),
            ({"tgt": np.zeros((2, 20), np.float32)}, "expected"),
            ({"memory": np.zeros((3, 4, 32), np.float32)}, "the same in every input"),
            ({"tgt": np.zeros((2, 3, 32), np.float32)}, "'tokens' is 16 to 9216"),
            ({"dac": 1}, "'dac' has dtype int64, expected bool"),
            ({"extra": 1}, r"unknown \['extra'\]"),
        ],
        ids=str,
    )
    def test_wrong_inputs(self, default_artifact: Path, change: dict[str, Any], fact: str) -> None:
        artifact = sam3x.load(default_artifact)
        with pytest.raises(ArtifactError, match=fact):
            artifact.run({**good_inputs(), **change})

    def test_dac_over_an_odd_batch(self, default_artifact: Path) -> None:
        inputs = {name: value[:1] if isinstance(value, np.ndarray) else value for name, value in good_inputs().items()}
        artifact = sam3x.load(default_artifact)
        assert artifact.run(inputs)["output"].shape == (1, 20, 32)
        with pytest.raises(ArtifactError, match="odd size 1"):
            artifact.run({**inputs, "dac": True})

    def test_tensors_and_arrays_give_the_same(self, default_artifact: Path) -> None:
        artifact = sam3x.load(default_artifact)
        arrays = good_inputs()
        tensors = {name: torch.as_tensor(value) for name, value in arrays.items()}
        np.testing.assert_array_equal(artifact.run(arrays)["output"], artifact.run(tensors)["output"])


def good_inputs() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "tgt": rng.standard_normal((2, 20, 32), np.float32),
        "memory": rng.standard_normal((2, 4, 32), np.float32),
        "memory_key_padding_mask": np.zeros((2, 4), bool),
        "query_pos": rng.standard_normal((2, 20, 32), np.float32),
        "dac": False,
        "pre_norm": True,
    }


def test_what_cannot_run_here_is_kept_unverified_and_completed_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(1)
    with monkeypatch.context() as patch:
        patch.setattr(OnnxTarget, "unverifiable", lambda self, options: "this machine has no such processor")
        artifact = sam3x.export(encoder, output=tmp_path / "out")
    assert artifact.manifest.verified is False and artifact.manifest.verification == ()
    assert artifact.manifest.verified_reason == "this machine has no such processor"
    records = api.verify(tmp_path / "out", sources.module_source(encoder, "again"))
    completed = sam3x.load(tmp_path / "out").manifest
    assert completed.verified and completed.verified_reason is None and list(completed.verification) == records
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == ["fusion_encoder.onnx", "manifest.json"]
