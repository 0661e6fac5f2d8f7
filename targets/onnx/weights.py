"""Weights of an ONNX graph stored in fewer bits, where they read back bit for bit (decision 0015).

The exporter rounds weights before it captures; here stand numbers that are already rounded, whatever the passes made of their
layout since. A number that float16, or int8 times a scale a slice, cannot hold exactly is no rounded weight, and stays float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

SMALLEST = 256
"""Elements of a tensor worth a conversion."""


def store(model: ir.Model, precision: str) -> dict[str, Any]:
    """Store what can be in ``fp16`` or ``int8`` and convert it once, in the outermost graph, in front of everything; in place.

    ``Cast`` (and ``Mul`` by the scale) and not ``DequantizeLinear``: ONNX Runtime fuses that one with the product after it into
    ``MatMulNBits``, which rounds activations too. ``Cast`` and ``Mul`` of constants it works out when it loads the file.

    Returns:
        Metadata for the manifest: how many tensors are stored so, the bytes they take, and the bytes of all others.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    if precision == "fp32":
        return {}
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    graph, added, narrow, wide = model.graph, [], 0, 0
    metadata: dict[str, Any] = {"narrow_tensors": 0}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        parts: Sequence[np.ndarray] | None = None
        if tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) > 1 and tensor.size >= SMALLEST and not _is_interface(value):
            parts = (as_half if precision == "fp16" else as_int8)(tensor.numpy())
        if parts is None:
            wide += tensor.nbytes
            continue
        del graph.initializers[name]
        nodes = _conversion(graph, name, parts)
        made = nodes[-1].outputs[0]
        made.dtype, made.shape = ir.DataType.FLOAT, value.shape
        ir.convenience.replace_all_uses_with(value, made)
        made.name = name
        added += nodes
        narrow += sum(part.nbytes for part in parts)
        metadata["narrow_tensors"] += 1
    if added:
        graph.insert_before(graph[0], added)
    return {**metadata, "narrow_bytes": narrow, "float32_bytes": wide}


def as_half(values: np.ndarray) -> tuple[np.ndarray] | None:
    """float32 as float16, or None where that loses anything."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return (half,) if np.array_equal(half.astype(np.float32), values) else None


def as_int8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """float32 as int8 and a float32 scale for each slice of some dimension, or None where that loses anything."""
    if not np.isfinite(values).all():
        return None
    for axis in range(values.ndim):
        largest = np.abs(values).max(axis=tuple(dim for dim in range(values.ndim) if dim != axis), keepdims=True)
        scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
        with np.errstate(all="ignore"):
            whole = np.rint(values / scale)
        if np.array_equal(whole * scale, values):
            return whole.astype(np.int8), scale
    return None


def _conversion(graph: ir.Graph, name: str, parts: Sequence[np.ndarray]) -> list[ir.Node]:
    """Initializers for ``parts`` and the nodes that make float32 of them, the last one's output the weight."""
    import onnx_ir as ir

    stored = []
    for part, kind in zip(parts, (parts[0].dtype.name, "scale"), strict=False):
        value = ir.Value(name=f"{name}_{kind}", const_value=ir.tensor(part, name=f"{name}_{kind}"))
        value.dtype, value.shape = ir.DataType.from_numpy(part.dtype), ir.Shape(part.shape)
        graph.register_initializer(value)
        stored.append(value)
    cast = ir.node("Cast", [stored[0]], attributes={"to": ir.DataType.FLOAT.value}, name=f"{name}_cast")
    cast.outputs[0].name = f"{name}_float32"
    cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(parts[0].shape)
    return [cast] if len(stored) == 1 else [cast, ir.node("Mul", [cast.outputs[0], stored[1]], name=f"{name}_mul")]


def _is_interface(value: ir.Value) -> bool:
    """Whether a caller may see it: as an output, or as an input with a default."""
    return value.is_graph_output() or value.is_graph_input()
