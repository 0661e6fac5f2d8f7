"""Products with constants in int8, activations quantized as they come (decision 0019).

``onnxruntime.quantization`` writes the same nodes and numbers, but sorts a graph without a look into its conditionals and
loops, and takes no ``Gemm`` whose weight stands outside of one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

    from sam3x.targets.onnx.calibrate import Ranges

SMALLEST, SMALLEST_OUTPUT = 256, 16
"""Elements of a weight worth quantizing; features of a product that is no head, whose numbers are boxes or scores."""

LARGEST, _MARK = 127, "Float32Weight"

_SATURATES = (
    "int8 on x86 wants VNNI or AMX: sums of two products saturate without, in ONNX Runtime's kernels; run sam3x verify there"
)


def register(registry: Any) -> None:
    """Teach torch's converter (an ``ONNXRegistry``) the mark of a weight that stays float32; ``quantize`` takes it away."""
    from torch.onnx._internal.exporter._registration import OnnxDecompMeta

    from sam3x.passes.precision.keep_float32 import FLOAT32_WEIGHT
    from sam3x.targets.onnx.loop import node

    def marked(weight: Any) -> Any:
        made = node(_MARK, [weight], domain="sam3x", version=1)
        made.dtype, made.shape = weight.dtype, weight.shape
        return made

    registry._register(
        FLOAT32_WEIGHT,
        OnnxDecompMeta(
            onnx_function=marked, fx_target=FLOAT32_WEIGHT, signature=None, is_custom=True, skip_signature_inference=True
        ),
    )


def _unmarked(graph: ir.Graph) -> set[ir.Value]:
    """The weights that are marked; their marks are gone then."""
    found = set()
    for mark in [node for node in graph if node.op_type == _MARK]:
        weight = mark.inputs[0]
        assert weight is not None
        mark.outputs[0].replace_all_uses_with(weight)
        graph.remove(mark, safe=True)
        found.add(weight)
    return found


def quantize(model: ir.Model, ranges_of: Callable[[Collection[str]], Ranges] | None = None) -> dict[str, Any]:
    """Every ``Gemm`` and ``MatMul`` with a large constant → ``DynamicQuantizeLinear``, ``MatMulInteger``, scales; in place.

    Weights are symmetric with a scale for each output channel; activations are uint8, one scale and zero point for the
    tensor, or for the tile of it where a loop takes tiles.
    Products with a marked weight stay float32.

    Args:
        ranges_of: gives the ranges of activations of the outermost graph, whose scales are then constants, by
            ``QuantizeLinear``; those of loops and conditionals are still a run's own.

    Returns:
        Metadata for the manifest: how many products are in int8, and what to know of them.
    """
    import onnx_ir as ir

    stored: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value]] = {}
    given: dict[tuple[ir.Graph, ir.Value], Any] = {}
    products: list[tuple[ir.Node, ir.Value, bool]]
    kept, products = _unmarked(model.graph), []
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        weight = node.inputs[1] if node.op_type in ("Gemm", "MatMul") else None
        tensor = None if weight is None else weight.const_value
        turned = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
        factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
        if node.attributes.get_int("transA", 0) or factors != [1.0, 1.0]:
            continue
        if weight is None or tensor is None or len(tensor.shape) != 2 or tensor.size < SMALLEST or weight in kept:
            continue
        if tensor.dtype != ir.DataType.FLOAT or tensor.numpy().shape[0 if turned else 1] < SMALLEST_OUTPUT:
            continue
        products.append((node, weight, turned))
    if ranges_of is not None:
        given |= _constant_scales(model.graph, [node for node, _, _ in products if node.graph is model.graph], ranges_of)
    calibrated = sum((node.graph, node.inputs[0]) in given for node, _, _ in products)
    for node, weight, turned in products:
        if (weight, turned) not in stored:
            stored[weight, turned] = _store(model.graph, weight, turned)
        _replace(node, stored[weight, turned], given)
    for weight, _ in stored:
        if not weight.uses() and not weight.is_graph_output():
            model.graph.initializers.pop(str(weight.name), None)
    counts = {"int8_products": len(products), **({} if ranges_of is None else {"calibrated_products": calibrated})}
    return {**counts, "notes": [_SATURATES] if products else []}


def _constant_scales(
    graph: ir.Graph, products: Sequence[ir.Node], ranges_of: Callable[[Collection[str]], Ranges]
) -> dict[tuple[ir.Graph, ir.Value], Any]:
    """Quantize each activation that has a range, behind where it is made; returns it as ``_replace`` takes it."""
    import onnx_ir as ir
    from onnxruntime.quantization.quant_utils import compute_scale_zp

    values = {str(node.inputs[0].name): node.inputs[0] for node in products if node.inputs[0] is not None}
    found: dict[tuple[ir.Graph, ir.Value], Any] = {}
    for name, (low, high) in ranges_of(values).items():
        x = values[name]
        zero_point, step = compute_scale_zp(low, high, np.uint8(0), np.uint8(255))
        scale = _initializer(graph, f"{name}_scale", np.asarray(step, np.float32))
        zero = _initializer(graph, f"{name}_zero_point", np.asarray(zero_point, np.uint8))
        made = ir.node("QuantizeLinear", [x, scale, zero], name=f"{name}_quantizelinear")
        whole = made.outputs[0]
        whole.name, whole.dtype, whole.shape = f"{name}_quantized", ir.DataType.UINT8, x.shape
        producer = x.producer()
        if producer is None:
            graph.insert_before(graph[0], [made])
        else:
            graph.insert_after(producer, [made])
        found[graph, x] = (whole, scale, zero)
    return found


def _store(graph: ir.Graph, weight: ir.Value, turned: bool) -> tuple[ir.Value, ir.Value]:
    """Initializers of a weight: (in, out) int8 and (out,) float32."""
    assert weight.const_value is not None
    values = weight.const_value.numpy()
    whole, scale = channels(values.T if turned else values)
    return _initializer(graph, f"{weight.name}_int8", whole), _initializer(graph, f"{weight.name}_scale", scale)


def channels(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(in, out) float32 → whole numbers, −127 to 127, and the scale of each output channel."""
    largest = np.abs(values).max(axis=0)
    scale = np.where(largest > 0, largest / np.float32(LARGEST), np.float32(1)).astype(np.float32)
    return np.ascontiguousarray(np.rint(values / scale).clip(-LARGEST, LARGEST).astype(np.int8)), scale


def _initializer(graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
    import onnx_ir as ir

    value = ir.Value(name=name, const_value=ir.tensor(values, name=name))
    value.dtype, value.shape = ir.DataType.from_numpy(values.dtype), ir.Shape(values.shape)
    graph.register_initializer(value)
    return value


def _replace(node: ir.Node, weight: tuple[ir.Value, ir.Value], given: dict[tuple[ir.Graph, ir.Value], Any]) -> None:
    """Put what computes in int8 in the place of a product; ``given``: activations that are quantized already."""
    import onnx_ir as ir

    graph, x, output = node.graph, node.inputs[0], node.outputs[0]
    assert isinstance(graph, ir.Graph) and x is not None
    nodes: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value, dtype: ir.DataType, outputs: int = 1, **attributes: Any) -> ir.Node:
        made = ir.node(
            op_type, list(inputs), attributes=attributes or None, num_outputs=outputs, name=f"{node.name}_{op_type.lower()}"
        )
        for index, value in enumerate(made.outputs):
            value.name, value.dtype = f"{output.name}_{op_type.lower()}_{index}", dtype
        nodes.append(made)
        return made

    if (graph, x) not in given:
        activations = add("DynamicQuantizeLinear", x, dtype=ir.DataType.FLOAT, outputs=3)
        activations.outputs[0].dtype = activations.outputs[2].dtype = ir.DataType.UINT8
        given[graph, x] = activations.outputs
    whole, scale, zero = given[graph, x]
    product = add("MatMulInteger", whole, weight[0], zero, dtype=ir.DataType.INT32)
    sums = add("Cast", product.outputs[0], dtype=ir.DataType.FLOAT, to=ir.DataType.FLOAT.value)
    scales = add("Mul", scale, weight[1], dtype=ir.DataType.FLOAT)
    scales.name, scales.outputs[0].name = f"{node.name}_scales", f"{output.name}_scales"
    last = add("Mul", sums.outputs[0], scales.outputs[0], dtype=ir.DataType.FLOAT)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        last = add("Add", last.outputs[0], node.inputs[2], dtype=ir.DataType.FLOAT)
    for made in (product, sums, last):
        made.outputs[0].shape = output.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [output], [last.outputs[0]])
