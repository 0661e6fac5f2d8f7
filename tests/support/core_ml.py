"""Runs an ``.mlpackage`` without Core ML: coremltools infers the values of operations with constant inputs, but for a few."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import coremltools
import numpy as np
import torch
from coremltools.converters.mil import Builder
from coremltools.converters.mil.frontend.milproto.load import load
from coremltools.converters.mil.mil import Function
from torch import Tensor
from torch.nn import functional


class Evaluated:
    """What is asked of an ``MLModel`` by its runner."""

    def __init__(self, package: Path) -> None:
        model = coremltools.models.MLModel(str(package), skip_model_load=True)
        self._spec = model.get_spec()
        program = load(self._spec, self._spec.specificationVersion, model.weights_dir)
        self._function = program.functions["main"]

    def get_spec(self) -> Any:
        return self._spec

    def predict(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        values: dict[Any, Any] = {value: inputs[name] for name, value in self._function.inputs.items()}
        with Function({}, opset_version=coremltools.target.iOS17):
            for operation in self._function.operations:
                if operation.op_type == "const":
                    values[operation.outputs[0]] = operation.outputs[0].val
                    continue
                given = {name: _given(value, values) for name, value in operation.inputs.items() if value is not None}
                values |= dict(zip(operation.outputs, _results(operation.op_type, given), strict=True))
        return {str(value.name): np.asarray(values[value]) for value in self._function.outputs}


def _given(value: Any, values: Mapping[Any, Any]) -> Any:
    return [_given(item, values) for item in value] if isinstance(value, (list, tuple)) else values.get(value, value.val)


def _results(kind: str, given: Mapping[str, Any]) -> list[Any]:
    if kind in _OWN:
        return [_OWN[kind](given).numpy()]
    made = getattr(Builder, kind)(
        **{name: bool(value) if isinstance(value, np.bool_) else value for name, value in given.items()}
    )
    found = [item.val for item in (made if isinstance(made, (list, tuple)) else [made])]
    assert all(item is not None for item in found), kind
    return found


def _tensors(given: Mapping[str, Any], *names: str) -> list[Tensor | None]:
    return [None if given.get(name) is None else torch.from_numpy(np.ascontiguousarray(given[name])) for name in names]


def _pads(given: Mapping[str, Any]) -> list[int]:
    """(before, after) of each dimension, the last one first, as ``functional.pad`` takes them."""
    pairs = np.reshape(given["pad"], (-1, 2)) if str(given["pad_type"]) == "custom" else np.zeros((given["x"].ndim - 2, 2), int)
    assert str(given["pad_type"]) in ("custom", "valid")
    return [int(size) for pair in pairs[::-1] for size in pair]


def _conv(given: Mapping[str, Any]) -> Tensor:
    x, weight, bias = _tensors(given, "x", "weight", "bias")
    sizes = {name: [int(size) for size in given[key]] for name, key in (("stride", "strides"), ("dilation", "dilations"))}
    padded = functional.pad(x, _pads(given))  # type: ignore[arg-type]
    return torch.convolution(
        padded, weight, bias, sizes["stride"], [0] * len(sizes["stride"]), sizes["dilation"], False, [0], int(given["groups"])
    )  # type: ignore[arg-type]


def _conv_transpose(given: Mapping[str, Any]) -> Tensor:
    x, weight, bias = _tensors(given, "x", "weight", "bias")
    assert not any(_pads(given)) and given.get("output_shape") is None
    steps = [int(size) for size in given["strides"]]
    return functional.conv_transpose2d(x, weight, bias, steps, groups=int(given["groups"]))  # type: ignore[arg-type]


def _gather_nd(given: Mapping[str, Any]) -> Tensor:
    x, indices = _tensors(given, "x", "indices")
    assert x is not None and indices is not None and int(given.get("batch_dims", 0)) == 0
    return x[tuple(indices.long().unbind(-1))]


def _select(given: Mapping[str, Any]) -> Tensor:
    return torch.from_numpy(np.where(given["cond"], given["a"], given["b"]))


def _nearest(given: Mapping[str, Any]) -> Tensor:
    (x,) = _tensors(given, "x")
    factors = [float(given[f"scale_factor_{side}"]) for side in ("height", "width")]
    return functional.interpolate(x, scale_factor=factors, mode="nearest")  # type: ignore[arg-type]


_OWN: dict[str, Callable[[Mapping[str, Any]], Tensor]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "gather_nd": _gather_nd,
    "select": _select,
    "upsample_nearest_neighbor": _nearest,
}
