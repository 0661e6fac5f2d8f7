"""ONNX files in OpenVINO's own runtime: ``openvino`` stands beside ONNX Runtime, ``onnxruntime-openvino`` in its place."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_DEFAULTS: dict[str, Any] = {
    "INFERENCE_PRECISION_HINT": "f32",  # a CPU with AMX would take bfloat16
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # where weights are int8, activations would be
}


def installed() -> bool:
    """Whether there is an OpenVINO runtime."""
    return importlib.util.find_spec("openvino") is not None


class OpenVinoRunner:
    """A compiled model.

    Args:
        options: ``device`` (``CPU``, ``GPU``, ``NPU``, …; default CPU), and OpenVINO's properties, as ``PERFORMANCE_HINT``.
    """

    def __init__(self, path: Path, threads: int | None, options: Mapping[str, Any]) -> None:
        import openvino

        core, device = openvino.Core(), str(options.get("device", "CPU"))
        for item in core.available_devices:  # AUTO and HETERO hand a model on to them
            known = core.get_property(item, "SUPPORTED_PROPERTIES")
            core.set_property(item, {name: value for name, value in _DEFAULTS.items() if name in known})
        properties = {name: value for name, value in options.items() if name != "device"}
        if threads is not None:
            properties["INFERENCE_NUM_THREADS"] = threads
        model = core.read_model(path)
        try:
            self._model = core.compile_model(model, device, properties)
        except RuntimeError:  # its code generator fails on a mask head's sums (2026.4, move_scalar_to_consumer)
            if device != "CPU" or "SNIPPETS_MODE" in properties:
                raise
            self._model = core.compile_model(model, device, {**properties, "SNIPPETS_MODE": "DISABLE"})
        self._outputs = [output.any_name for output in self._model.outputs]
        self._inputs = {name for item in self._model.inputs for name in item.names}

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # what a graph does not read, OpenVINO does not know
        found = self._model({name: value for name, value in inputs.items() if name in self._inputs})
        return {name: value.copy() for name, value in zip(self._outputs, found.values(), strict=True)}


def left_out(path: Path, options: Mapping[str, Any]) -> tuple[int, Counter[str]]:
    """How many operators a file has, and those, by type, that the device does not run."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    known = core.query_model(model, str(options.get("device", "CPU")))
    operators = model.get_ordered_ops()
    missing = Counter(item.get_type_name() for item in operators if item.get_friendly_name() not in known)
    return len(operators), missing
