"""Providers: OpenVINO's own runtime, memory of a device, and which nodes fall back to the CPU."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from sam3x.errors import SpecError, TargetUnavailableError
from sam3x.runtime import Segmenter
from sam3x.targets.onnx import device, openvino
from sam3x.targets.onnx.session import checked_providers
from support.command_line import run
from support.image_model import photograph


def answers(segmenter: Segmenter) -> list[Any]:
    image = segmenter.encode(photograph())
    return [segmenter.segment(image, [[1, 7, 9], [1, 3, 9]], threshold=0.0) for _ in range(2)]


def test_openvino_runs_the_same_files(tiny_pipeline: Path) -> None:
    assert "OpenVINOExecutionProvider" not in ort.get_available_providers()
    settings = [("openvino", {"device": "CPU", "PERFORMANCE_HINT": "LATENCY"})]
    got, _ = answers(Segmenter(tiny_pipeline, providers=settings, threads=1))
    wanted, _ = answers(Segmenter(tiny_pipeline))
    assert len(got) == len(wanted) and np.abs(got.scores - wanted.scores).max() < 1e-5
    assert np.abs(got.small_masks - wanted.small_masks).max() < 1e-4 * np.abs(wanted.small_masks).max()


def test_without_openvino_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "installed", lambda: False)
    with pytest.raises(TargetUnavailableError, match=r"without OpenVINO.*brings it: pip install openvino$"):
        checked_providers("openvino")


def test_features_stay_on_the_device(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for a device: what goes up is the picture and the prompts, features are read where they are."""
    wanted = answers(Segmenter(tiny_pipeline))
    monkeypatch.setitem(device.DEVICES, "CPUExecutionProvider", "cpu")
    uploaded: list[tuple[int, ...]] = []
    upload = device.DeviceMemory._uploaded
    monkeypatch.setattr(
        device.DeviceMemory, "_uploaded", lambda self, array: uploaded.append(array.shape) or upload(self, array)
    )
    segmenter = Segmenter(tiny_pipeline, providers="cpu")
    image = segmenter.encode(photograph())
    assert len(uploaded) == 1 and not any(value.flags.writeable for value in image.tensors.values())
    got = [segmenter.segment(image, [[1, 7, 9]], threshold=0.0)]
    features = {value.shape for value in image.tensors.values()}
    assert not features & set(uploaded[1:])
    got.append(segmenter.segment(image, [[1, 7, 9], [1, 3, 9]], threshold=0.0))
    for result, expected in zip(got[1:], wanted[:1], strict=True):
        assert np.array_equal(result.scores, expected.scores) and np.array_equal(result.small_masks, expected.small_masks)
    memory = segmenter._components._settings["memory"]
    assert len(memory._copies) >= len(features)
    del image, got, result
    gc.collect()
    assert not memory._copies


def test_a_device_has_a_number() -> None:
    memory = device.memory_of([("CUDAExecutionProvider", {"device_id": "1"}), "CPUExecutionProvider"])
    assert memory is not None and (memory.device, memory.number) == ("cuda", 1)
    assert device.memory_of(["CPUExecutionProvider"]) is None and device.memory_of([]) is None


@pytest.mark.parametrize(("provider", "left"), [("cpu", False), ("azure", True), ("openvino", False)])
def test_inspect_lists_what_falls_back(provider: str, left: bool, default_artifact: Path) -> None:
    done = run("inspect", default_artifact, "--provider", provider, "--json")
    assert done.exit_code == 0, done.stderr
    (component,) = json.loads(done.stdout)["components"].values()
    assert component["nodes"] > 100 and (sum(component["on_cpu"].values()) == component["nodes"]) is left
    assert left or component["on_cpu"] == {}
    table = run("inspect", default_artifact, "--provider", provider)
    assert table.exit_code == 0 and ("Reshape" in table.stdout) is left


def test_options_of_a_provider_on_the_command_line(tiny_pipeline: Path, tmp_path: Path) -> None:
    for provider, fact in (("cpu:use_arena", "NAME:KEY=VALUE"), ("cdua", "Did you mean 'cuda'")):
        refused = run("inspect", tiny_pipeline, "--provider", provider)
        assert refused.exit_code == 2 and fact in refused.stderr
    assert checked_providers([("cpu", {"use_arena": "0"})]) == [("CPUExecutionProvider", {"use_arena": "0"})]
    with pytest.raises(TargetUnavailableError, match=r"without DmlExecutionProvider.*onnxruntime-directml"):
        checked_providers("directml")
    with pytest.raises(SpecError, match="no provider"):
        checked_providers("openvinno")
