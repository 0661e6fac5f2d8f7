"""A pipeline in Triton Inference Server: its model, the client, and both with a server that runs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format

from sam3x.demo import WEIGHTS
from sam3x.errors import ArtifactError, SpecError
from sam3x.pipeline import export_pipeline, transformers_image_source
from sam3x.pipeline.serving import MODEL, write_model
from sam3x.runtime import Result, Segmenter
from sam3x.runtime.client import Client
from sam3x.runtime.components import Components
from sam3x.runtime.manifest import load_manifest
from sam3x.runtime.server import PipelineModel
from support.triton import installed, model_config, serving, with_stand_ins

QUESTIONS: dict[str, dict[str, Any]] = {
    "words": {"text": ["a red circle", "blue", "dog", "cat", "a green square"], "threshold": 0.0},
    "boxes": {"boxes": [[10, 10, 50, 60], [-5, 5, 20, 30]], "labels": [True, False], "threshold": 0.05},
    "both": {"text": ["a red circle", "blue"], "boxes": [[[10, 10, 50, 60]], []], "threshold": [0.1, 0.0], "max_detections": 3},
    "nothing": {"text": "dog", "threshold": 1.0},
}


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


def check(found: Result, wanted: Result) -> None:
    """The text encoder is asked a prompt at a time, whose sums may differ in the last bits."""
    assert found.labels == wanted.labels and found.prompts == wanted.prompts
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
    np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-3)
    np.testing.assert_allclose(found.small_masks, wanted.small_masks, atol=1e-3)


class Tensor:
    """``triton_python_backend_utils.Tensor``."""

    def __init__(self, name: str, value: np.ndarray) -> None:
        assert value.ndim, "a request has no scalars"
        self._name, self._value = name, value

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._value


@pytest.fixture
def model(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model that an export writes, in a server's stead: its component models are run by ONNX Runtime."""
    manifest = load_manifest(tiny_pipeline)
    components = Components(tiny_pipeline, manifest, threads=1)

    def answered(*, model_name: str, requested_output_names: list[str], inputs: list[Tensor], **_: Any) -> Any:
        try:
            found = components.open(model_name).run({item.name(): item.as_numpy() for item in inputs})
        except Exception as error:
            message = str(error)
            failed = types.SimpleNamespace(has_error=lambda: True, error=lambda: types.SimpleNamespace(message=lambda: message))
            return types.SimpleNamespace(exec=lambda: failed)
        tensors = [Tensor(name, found[name]) for name in requested_output_names]
        response = types.SimpleNamespace(has_error=lambda: False, output_tensors=lambda: tensors)
        return types.SimpleNamespace(exec=lambda: response)

    utils = types.ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.InferenceRequest = Tensor, answered  # type: ignore[attr-defined]
    utils.PreferredMemory, utils.TRITONSERVER_MEMORY_CPU = (lambda *_: None), 0  # type: ignore[attr-defined]
    utils.get_input_tensor_by_name = lambda request, name: request.get(name)  # type: ignore[attr-defined]
    utils.InferenceResponse = types.SimpleNamespace  # type: ignore[attr-defined]
    utils.TritonError = lambda message: message  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    write_model(tmp_path, manifest)
    spec = importlib.util.spec_from_file_location("model", tmp_path / MODEL / "1" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.TritonPythonModel()
    made.initialize({"model_repository": str(tmp_path / MODEL), "model_version": "1"})
    return made


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_model_over_the_components_gives_what_the_segmenter_gives(
    question: str, model: PipelineModel, tiny_pipeline: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def infer(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (response,) = model.execute([{name: Tensor(name, value) for name, value in tensors.items()}])
        return {item.name(): item.as_numpy() for item in response.output_tensors}

    client = Client(tiny_pipeline)
    monkeypatch.setattr(client, "_infer", infer)
    assert "image_embed" not in model.run("vision_encoder", {"image": np.zeros((1, 3, 112, 112), np.float32)})  # for clicks
    check(client.segment(picture, **QUESTIONS[question]), Segmenter(tiny_pipeline).segment(picture, **QUESTIONS[question]))


@pytest.mark.parametrize(
    ("changed", "fact"),
    [
        ({"image": np.zeros((9, 9, 3), np.uint8)}, "the picture is 112 x 112 x 3"),
        ({"input_ids": np.array([[1, 9999]])}, "token ids are below 530"),
        ({"input_ids": np.ones((1, 40), np.int64)}, "input_ids are prompts x 1 to 16 tokens, got 1 x 40"),
        ({"attention_mask": np.zeros((1, 2), bool)}, "attention_mask is True"),
        ({"boxes": np.zeros((1, 1, 4), np.float32)}, "box_labels, box_mask is missing"),
        ({"threshold": np.array([0.1, 0.2], np.float32)}, "threshold has one value"),
        ({"threshold": np.array([np.nan], np.float32)}, "a threshold is a number from 0 to 1"),
        ({"max_detections": np.array([0])}, "max_detections is a whole number from 1"),
    ],
)
def test_a_request_that_does_not_fit_is_one_sentence(changed: dict[str, np.ndarray], fact: str, model: PipelineModel) -> None:
    tensors = {
        "image": np.zeros((112, 112, 3), np.uint8),
        "input_ids": np.array([[1, 2]]),
        "attention_mask": np.ones((1, 2), bool),
        **changed,
    }
    (response,) = model.execute([{name: Tensor(name, value) for name, value in tensors.items()}])
    assert fact in response.error


def test_a_component_that_fails_is_named(model: PipelineModel) -> None:
    with pytest.raises(ArtifactError, match="vision_encoder failed"):
        model.run("vision_encoder", {"image": np.zeros((1, 3, 5, 5), np.float32)})


def test_the_server_needs_neither_torch_nor_a_runtime() -> None:
    heavy = "{'torch', 'onnxruntime', 'PIL', 'tokenizers', 'pycocotools'}"
    code = f"import sys, sam3x.runtime.server; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_client_without_a_server_and_of_no_protocol_is_one_sentence(tiny_pipeline: Path, picture: np.ndarray) -> None:
    for protocol in ("http", "grpc"):
        client = Client(tiny_pipeline, "localhost:9", protocol=protocol)  # type: ignore[arg-type]
        with client, pytest.raises(ArtifactError, match="localhost:9 gives no answer"):
            client.segment(picture, "dog")
    with pytest.raises(SpecError, match="protocol is http or grpc"):
        Client(tiny_pipeline, protocol="carrier pigeon")  # type: ignore[arg-type]


def test_what_is_not_whole_has_no_model_of_its_own(tiny_pipeline: Path, tmp_path: Path) -> None:
    manifest = load_manifest(tiny_pipeline)
    write_model(tmp_path, manifest.model_copy(update={"components": manifest.components[:-2]}))
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_repository_is_of_tritons_schema_and_of_the_files(triton_pipeline: Path) -> None:
    schema = model_config()
    configs = {path.parent.name: path for path in triton_pipeline.glob("*/config.pbtxt")}
    assert configs.keys() == {MODEL, *(item.name for item in load_manifest(triton_pipeline).components)}
    batched, cached = set(), set()
    for name, path in configs.items():
        config = text_format.Parse(path.read_text(), schema.ModelConfig())
        assert config.name == name
        if name == MODEL:
            continue
        session = onnxruntime.InferenceSession(path.parent / "1" / "model.onnx")
        extra = 1 if config.max_batch_size else 0
        for given, nodes in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
            assert [item.name for item in given] == [item.name for item in nodes]
            assert [len(item.dims) + extra for item in given] == [len(node.shape) for node in nodes]
            for item, node in zip(given, nodes, strict=True):
                sizes = zip(item.dims, node.shape[extra:], strict=True)
                assert all(dim == (size if isinstance(size, int) else -1) for dim, size in sizes)
        batched |= {name} if config.HasField("dynamic_batching") else set()
        cached |= {name} if config.response_cache.enable else set()
    assert batched == cached == {"text_encoder"}  # every other one reads something of one picture
    assert Segmenter(triton_pipeline).segment(np.zeros((60, 80, 3), np.uint8), "dog", threshold=0)


@pytest.mark.long
def test_an_engine_of_a_component_is_a_model_too(tmp_path: Path) -> None:
    source, chosen = transformers_image_source(WEIGHTS), ["text_encoder"]
    options: dict[str, Any] = {"compute_capability": "sm89", "layout": "triton"}
    manifest = export_pipeline(source, target="trt", output=tmp_path / "out", components=chosen, **options)
    assert {"text_encoder/1/model.plan", "text_encoder/config.pbtxt"} <= manifest.files.keys()
    assert not any(name.startswith(f"{MODEL}/") for name in manifest.files)
    config = text_format.Parse((tmp_path / "out/text_encoder/config.pbtxt").read_text(), model_config().ModelConfig())
    most = manifest.components[0].ranges["prompts"][1]
    assert (config.backend, config.max_batch_size) == ("tensorrt", most) and config.HasField("dynamic_batching")


@pytest.mark.long
def test_a_server_gives_what_the_segmenter_gives(triton_pipeline: Path, picture: np.ndarray, tmp_path: Path) -> None:
    """Words that come again are answered by its cache; without one it serves, too."""
    (tmp_path / "wheel").mkdir()
    root = installed(tmp_path / "wheel")
    segmenter = Segmenter(triton_pipeline)
    repository = with_stand_ins(triton_pipeline, tmp_path / "models", tmp_path / "wheel" / "packages")
    with serving(root, repository, tmp_path, "--cache-config=local,size=104857600") as server:
        for protocol, port in (("http", server.http), ("grpc", server.grpc)):
            with Client(triton_pipeline, f"localhost:{port}", protocol=protocol) as client:  # type: ignore[arg-type]
                for question in QUESTIONS.values():
                    check(client.segment(picture, **question), segmenter.segment(picture, **question))
        metrics = server.told()
        assert 'nv_cache_num_misses_per_model{model="text_encoder",version="1"} 6\n' in metrics  # five texts and "visual"
    with serving(root, repository, tmp_path) as server, Client(triton_pipeline, f"localhost:{server.http}") as client:
        check(client.segment(picture, "dog", threshold=0), segmenter.segment(picture, "dog", threshold=0))
        with pytest.raises(ArtifactError, match="no_such"):
            Client(triton_pipeline, f"localhost:{server.http}", model="no_such").segment(picture, "dog")


@pytest.mark.long
def test_clients_at_a_time_do_not_touch_each_others_answers(triton_pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "wheel").mkdir()
    root = installed(tmp_path / "wheel")
    repository = with_stand_ins(triton_pipeline, tmp_path / "models", tmp_path / "wheel" / "packages")
    config = repository / MODEL / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 4"))
    segmenter, draw = Segmenter(triton_pipeline), np.random.default_rng(3)
    pictures = [draw.integers(0, 256, (60 + index, 80, 3), dtype=np.uint8) for index in range(4)]
    texts = ["a red circle", "dog", "a green triangle", "cat"]
    wanted = [[segmenter.segment(item, [text, "blue"], threshold=0.01) for text in texts] for item in pictures]

    def asked(index: int) -> list[Result]:
        with Client(triton_pipeline, f"localhost:{server.grpc}", protocol="grpc") as client:
            return [client.segment(pictures[index], [text, "blue"], threshold=0.01) for text in texts * 3]

    with serving(root, repository, tmp_path) as server, ThreadPoolExecutor(4) as threads:
        for found, of_picture in zip(threads.map(asked, range(4)), wanted, strict=True):
            for result, expected in zip(found, of_picture * 3, strict=True):
                check(result, expected)
