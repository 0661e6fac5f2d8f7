"""Ranges of activations that inputs give, by ONNX Runtime's calibrator."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

Ranges = dict[str, tuple[np.ndarray, np.ndarray]]
"""Activation → its least and largest number, float32."""


def ranges_of(model: ir.Model, names: Collection[str], inputs: Sequence[Mapping[str, np.ndarray]], folder: Path) -> Ranges:
    """Run a float32 model and return what ``names`` reach.

    Args:
        names: values of its outermost graph that products or convolutions read or give. folder: for files that go afterwards.
    """
    import onnx_ir as ir
    from onnxruntime.quantization.calibrate import create_calibrator

    taken = [str(value.name) for value in model.graph.inputs]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place, "float.onnx")
        ir.save(model, path, external_data=f"{path.name}.data")
        calibrator: Any = create_calibrator(
            path,
            ["Gemm", "MatMul", "Conv"],
            augmented_model_path=str(path.with_name("augmented.onnx")),
            use_external_data_format=True,
        )
        for item in inputs:  # one at a time: it holds what every run of a call gives
            calibrator.collect_data(_Reader({name: item[name] for name in taken}))
        found = calibrator.compute_data().data
        del calibrator  # it may still read from ``place``
    ends = {
        name: [np.asarray(end, np.float32).reshape(()) for end in found[name].range_value] for name in names if name in found
    }
    return {name: (low, high) for name, (low, high) in ends.items()}


class _Reader:
    """What the calibrator asks for the next inputs: those, then none."""

    def __init__(self, inputs: dict[str, np.ndarray]) -> None:
        self._left = [inputs]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self._left.pop() if self._left else None
