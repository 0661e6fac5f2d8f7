"""OpenVINO IR in OpenVINO's own runtime against Meta's layers: branches, sizes, padding, weights, what is refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from torch import nn

import sam3x
from sam3x.capture.samples import Sizes
from sam3x.errors import LoweringError, SpecError, TargetUnavailableError
from sam3x.pipeline import export_pipeline, module_image_source
from sam3x.pipeline.compatibility import SMALL
from sam3x.runtime import Segmenter
from sam3x.sources.image import random_image_source
from sam3x.targets.openvino.target import OpenVinoTarget
from support.command_line import run
from support.folders import MadeOnce, contents
from support.image_model import photograph
from support.upstream import check_branches, encoder_of


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return encoder_of(2)


@pytest.fixture(scope="module")
def artifact(encoder: nn.Module, made_once: MadeOnce) -> sam3x.Artifact:
    def write(folder: Path) -> None:
        sam3x.export(encoder, target="openvino", output=folder)

    return sam3x.load(made_once("openvino", write))


# ---- numbers


@pytest.mark.parametrize("padding", ["none", "some", "all"])
@pytest.mark.parametrize(("batch", "tokens", "prompt"), [(1, 37, 1), (2, 36, 7), (4, 300, 77)])
def test_every_branch_size_and_padding(
    artifact: sam3x.Artifact, encoder: nn.Module, batch: int, tokens: int, prompt: int, padding: str
) -> None:
    check_branches(artifact, encoder, Sizes(batch=batch, tokens=tokens, prompt_length=prompt, padding=padding))


def test_conditionals_and_all_masks(tmp_path: Path) -> None:
    encoder = encoder_of(1)
    names = ("tgt", "memory", "tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "pos", "query_pos")
    made = sam3x.export(encoder, target="openvino", output=tmp_path / "out", inputs=names, branches="cond", pre_norm=True)
    for padding in ("some", "all"):
        check_branches(
            made, encoder, Sizes(batch=2, tokens=36, prompt_length=5, padding=padding), [(False, True), (True, True)]
        )


def test_peaked_attention_stays_as_near_to_float64_as_eager(tmp_path: Path) -> None:
    encoder = encoder_of(1, peaked=4.0)
    made = sam3x.export(encoder, target="openvino", output=tmp_path / "out", dac=False, pre_norm=True)
    check_branches(made, encoder, Sizes(batch=2, tokens=36, prompt_length=32), [(False, True)])


# ---- files


def test_the_manifest_holds_both_files_and_every_input_stands_in_the_ir(artifact: sam3x.Artifact) -> None:
    manifest = artifact.manifest
    assert artifact.path.name == "fusion_encoder.xml" and manifest.verified
    assert set(manifest.files) == {"fusion_encoder.xml", "fusion_encoder.bin"}
    assert set(contents(artifact.folder)) == {*manifest.files, "manifest.json"}
    model = openvino.Core().read_model(artifact.path)
    assert [item.names for item in model.inputs] == [{name} for name in manifest.input_names]
    assert [item.names for item in model.outputs] == [{name} for name in manifest.output_names]
    assert str(artifact.folder.parent) not in artifact.path.read_text()


def test_an_input_that_is_not_read_stands_in_the_ir_too(tmp_path: Path) -> None:
    encoder = encoder_of(1, pos_enc_at_cross_attn_keys=False, pos_enc_at_attn=False)
    made = sam3x.export(encoder, target="openvino", output=tmp_path / "out", dac=False, pre_norm=True)
    model = openvino.Core().read_model(made.path)
    assert [item.any_name for item in model.inputs] == list(made.manifest.input_names)


@pytest.mark.parametrize(("weights", "share"), [("fp16", 0.6), ("int8", 0.4)])
def test_weights_that_are_stored_in_less_compute_in_float32(
    weights: str, share: float, encoder: nn.Module, artifact: sam3x.Artifact, tmp_path: Path
) -> None:
    made = sam3x.export(encoder, target="openvino", output=tmp_path / "out", weights=weights, pre_norm=True)
    assert made.manifest.verified and all(record.max_abs < 2e-5 for record in made.manifest.verification)
    sizes = [item.path.with_suffix(".bin").stat().st_size for item in (made, artifact)]
    assert sizes[0] < share * sizes[1]


RUN = """
import sys
import numpy as np
import sam3x
artifact = sam3x.load(sys.argv[1])
size = {"batch": 2, "tokens": 36, "prompt_length": 5}
inputs = {item.name: np.zeros([size.get(dim, dim) for dim in item.shape], item.dtype) for item in artifact.manifest.inputs}
print(artifact.run(inputs)["output"].shape, {"torch", "onnx", "onnxruntime"} & set(sys.modules))
"""


def test_it_runs_without_torch_and_onnx(artifact: sam3x.Artifact) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, str(artifact.folder)], capture_output=True, text=True)
    assert done.stdout.strip() == "(2, 36, 32) set()", done.stderr


def test_inspect_lists_what_a_device_leaves_out(artifact: sam3x.Artifact) -> None:
    done = run("inspect", artifact.folder, "--provider", "openvino:device=CPU", "--json")
    assert done.exit_code == 0, done.stderr
    (component,) = json.loads(done.stdout)["components"].values()
    assert component["nodes"] > 100 and component["on_cpu"] == {}
    refused = run("inspect", artifact.folder, "--provider", "cuda")
    assert refused.exit_code == 2 and "run by OpenVINO alone" in refused.stderr


# ---- pipelines


def test_a_component(tmp_path: Path) -> None:
    """Boxes of any number, ``roi_align``, a mask."""
    options: dict[str, Any] = {"output": tmp_path / "out", "components": ["prompt_encoder"]}
    manifest = export_pipeline(random_image_source(SMALL), target="openvino", **options)
    (item,) = manifest.components
    assert item.file == "prompt_encoder.xml" and manifest.verified
    assert all(record.max_rel < 1e-5 for record in item.verification)


@pytest.mark.long
def test_a_whole_pipeline_finds_what_onnx_runtime_finds(
    tiny_model: nn.Module, tiny_vocabulary: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    export_pipeline(module_image_source(tiny_model), target="openvino", output=tmp_path / "out", tokenizer=tiny_vocabulary)
    settings: dict[str, Any] = {"threads": 1, "providers": [("openvino", {"PERFORMANCE_HINT": "LATENCY"})]}
    found = []
    for segmenter in (Segmenter(tmp_path / "out", **settings), Segmenter(tiny_pipeline)):
        found.append(segmenter.segment(segmenter.encode(photograph()), [[1, 7, 9], [1, 3, 9]], threshold=0.0))
    got, wanted = found
    assert len(got) == len(wanted) and np.abs(got.scores - wanted.scores).max() < 1e-5
    assert np.abs(got.small_masks - wanted.small_masks).max() < 1e-4 * np.abs(wanted.small_masks).max()


# ---- errors


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_precision_that_the_runtime_chooses_is_refused(precision: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"precision.*fp32"):
        sam3x.export(target="openvino", output=tmp_path / "out", precision=precision)
    assert not (tmp_path / "out").exists()


def test_without_openvino_it_says_how_to_get_it(
    artifact: sam3x.Artifact, encoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else found(name, *rest))
    with pytest.raises(TargetUnavailableError, match=r'missing openvino\. Install it: pip install "sam3x\[openvino\]"'):
        sam3x.export(encoder, target="openvino", output=tmp_path / "out")
    with pytest.raises(TargetUnavailableError, match=r"needs openvino. Install it: pip install openvino"):
        OpenVinoTarget().load_runner(artifact.path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("providers", ["cuda", [], ["openvino", "cpu"], [("openvino", 3)], 5])
def test_what_is_no_device_of_openvino_is_refused(providers: Any) -> None:
    with pytest.raises(SpecError, match=r"run by OpenVINO alone.*openvino:device=GPU"):
        OpenVinoTarget().session_settings(providers=providers)


def test_a_graph_that_openvino_does_not_read_is_one_sentence(
    encoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, path: Path) -> None:
        raise RuntimeError("Check failed at a place:\nNo conversion for Foo")

    monkeypatch.setattr(openvino.Core, "read_model", refuse)
    with pytest.raises(LoweringError, match=r"OpenVINO does not take the graph: No conversion for Foo"):
        sam3x.export(encoder, target="openvino", output=tmp_path / "out", dac=False, pre_norm=True)
    assert not (tmp_path / "out").exists()
