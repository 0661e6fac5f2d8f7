"""``--layout triton``: config.pbtxt parsed by Triton's own schema, and the names and shapes a request will have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from google.protobuf import text_format
from torch import nn

import sam3x
from sam3x.capture.capture import capture
from sam3x.errors import SpecError
from sam3x.pipeline.request import resolve
from sam3x.spec import make_spec
from sam3x.targets.tensorrt.target import DISTRIBUTIONS, TrtTarget, distribution
from sam3x.targets.triton import dynamic_batch
from support.triton import model_config
from support.upstream import encoder_of


@pytest.fixture(scope="module")
def schema() -> Any:
    return model_config()


def config(schema: Any, folder: Path) -> Any:
    return text_format.Parse((folder / "fusion_encoder" / "config.pbtxt").read_text(), schema.ModelConfig())


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return encoder_of(1)


def test_onnx_with_flags(schema: Any, encoder: nn.Module, tmp_path: Path) -> None:
    artifact = sam3x.export(encoder, target="onnx", output=tmp_path / "out", layout="triton")
    assert set(artifact.manifest.files) == {"fusion_encoder/1/model.onnx", "fusion_encoder/config.pbtxt"}
    assert artifact.manifest.verified and artifact.path == tmp_path / "out/fusion_encoder/1/model.onnx"
    found = config(schema, tmp_path / "out")
    assert (found.name, found.backend, found.max_batch_size) == ("fusion_encoder", "onnxruntime", 0)
    assert not found.HasField("dynamic_batching")  # a flag has no batch, and dac mixes what is in one
    session = onnxruntime.InferenceSession(artifact.path)
    assert [item.name for item in found.input] == [item.name for item in session.get_inputs()]
    assert [item.name for item in found.output] == [item.name for item in session.get_outputs()]
    shapes = {item.name: list(item.dims) for item in found.input}
    assert shapes["tgt"] == [-1, -1, 32] and shapes["memory_key_padding_mask"] == [-1, -1] and shapes["dac"] == [1]
    assert next(item for item in found.input if item.name == "dac").HasField("reshape")
    kinds = {item.name: schema.DataType.Name(item.data_type) for item in found.input}
    assert kinds["tgt"] == "TYPE_FP32" and kinds["pre_norm"] == kinds["memory_key_padding_mask"] == "TYPE_BOOL"
    assert found.version_policy.latest.num_versions == 1


def test_an_engine_of_one_branch_batches_requests(schema: Any, encoder: nn.Module, tmp_path: Path) -> None:
    options = {"dac": False, "pre_norm": True, "batch": (1, 4), "tokens": 36, "compute_capability": "sm89"}
    artifact = sam3x.export(encoder, target="trt", output=tmp_path / "out", layout="triton", **options)
    assert set(artifact.manifest.files) == {"fusion_encoder/1/model.plan", "fusion_encoder/config.pbtxt"}
    found = config(schema, tmp_path / "out")
    assert (found.backend, found.max_batch_size) == ("tensorrt", 4) and found.HasField("dynamic_batching")
    assert {item.name: list(item.dims) for item in found.input}["tgt"] == [36, 32]
    assert list(found.output[0].dims) == [36, 32]
    of_rtx = DISTRIBUTIONS[str(distribution())] == "TensorRT-RTX"
    assert any("Triton's tensorrt backend" in note for note in artifact.manifest.notes) == of_rtx


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({"dac": False, "pre_norm": "module"}, 8),
        ({"dac": False, "pre_norm": True, "batch": 4}, 0),
        ({"dac": True, "pre_norm": True}, 0),
        ({"dac": False}, 0),
        ({"dac": False, "pre_norm": True, "interface": "feature_maps"}, 0),
        ({"dac": False, "pre_norm": True, "inputs": ("tgt", "memory", "memory_mask")}, 0),
    ],
)
def test_only_requests_that_do_not_touch_each_other_are_batched(options: dict[str, Any], batch: int) -> None:
    encoder = encoder_of(1).layers[0] if options.get("interface") != "feature_maps" else encoder_of(1)
    assert dynamic_batch(capture(encoder, make_spec(**options))) == batch


def test_a_torch_program_is_no_model_of_triton() -> None:
    with pytest.raises(SpecError, match=r"--layout triton.*another --format"):
        resolve(TrtTarget(), {"compute_capability": "sm89", "format": "ep", "layout": "triton"})
