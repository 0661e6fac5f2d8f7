"""Products with constants in int8, activations quantized as they come (decision 0019).

``onnxruntime.quantization`` writes the same nodes and numbers, but sorts a graph without a look into its conditionals and
loops, and takes no ``Gemm`` whose weight stands outside of one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3x.passes.precision.autocast import worth_int8

if TYPE_CHECKING:
    import onnx_ir as ir

    from sam3x.targets.onnx.calibrate import Ranges

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
            ``QuantizeLinear``; those of loops and conditionals are still a run's own. Convolutions there are then
            ``QLinearConv``: without ranges they stay float32, as ``ConvInteger`` is slower than that.

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
        if weight is None or tensor is None or len(tensor.shape) != 2 or weight in kept:
            continue
        if tensor.dtype != ir.DataType.FLOAT or not worth_int8(tensor.shape.numpy()[:: 1 if turned else -1]):
            continue
        products.append((node, weight, turned))
    convolutions: list[ir.Node] = []
    if ranges_of is not None:
        convolutions = [node for node in model.graph if node.op_type == "Conv" and _is_large(node, kept)]
        read = [node.inputs[0] for node, _, _ in products if node.graph is model.graph]
        values = {
            str(x.name): x for x in (*read, *(x for node in convolutions for x in (node.inputs[0], node.outputs[0]))) if x
        }
        ranges = ranges_of(values)
        convolutions = [node for node in convolutions if {_name(node.inputs[0]), _name(node.outputs[0])} <= ranges.keys()]
        taken = {_name(x) for x in (*read, *(node.inputs[0] for node in convolutions))}
        given |= _constant_scales(model.graph, {name: x for name, x in values.items() if name in taken}, ranges)
        for node in convolutions:
            x, old = node.inputs[0], node.outputs[0]
            assert x is not None
            new = _convolve(node, given[model.graph, x], ranges[_name(old)])
            if (model.graph, old) in given:
                given[model.graph, new] = given.pop((model.graph, old))
    calibrated = sum((node.graph, node.inputs[0]) in given for node, _, _ in products)
    for node, weight, turned in products:
        if (weight, turned) not in stored:
            stored[weight, turned] = _store(model.graph, weight, turned)
        _replace(node, stored[weight, turned], given)
    for weight, _ in stored:
        if not weight.uses() and not weight.is_graph_output():
            model.graph.initializers.pop(str(weight.name), None)
    counts = {"int8_products": len(products)}
    if ranges_of is not None:
        counts |= {"calibrated_products": calibrated, "int8_convolutions": len(convolutions)}
    return {**counts, "notes": [_SATURATES] if products or convolutions else []}


def _name(value: ir.Value | None) -> str:
    return "" if value is None else str(value.name)


def _is_large(node: ir.Node, kept: set[ir.Value]) -> bool:
    """Tell whether a convolution is quantized: its weight and bias are constants, large enough, and it is not in ``kept``."""
    import onnx_ir as ir

    weight = node.inputs[1]
    tensor = None if weight is None else weight.const_value
    if weight is None or tensor is None or weight in kept or tensor.dtype != ir.DataType.FLOAT:
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return worth_int8(tensor.shape.numpy()) and (bias is None or bias.const_value is not None)


def _convolve(
    node: ir.Node, quantized: tuple[ir.Value, ir.Value, ir.Value], reached: tuple[np.ndarray, np.ndarray]
) -> ir.Value:
    """Put ``QLinearConv`` in the place of a ``Conv``, and return what comes out; ``reached``: its least and largest number."""
    import onnx_ir as ir

    graph, output, weight = node.graph, node.outputs[0], node.inputs[1]
    assert isinstance(graph, ir.Graph) and weight is not None and weight.const_value is not None
    values = weight.const_value.numpy()
    whole, scale = channels(values.reshape(len(values), -1).T)
    x, x_scale, x_zero = quantized
    assert x_scale.const_value is not None
    stored = [
        _initializer(graph, f"{node.name}_weight_int8", whole.T.reshape(values.shape)),
        _initializer(graph, f"{node.name}_weight_scale", scale),
        _initializer(graph, f"{node.name}_weight_zero_point", np.zeros(len(scale), np.int8)),
        *_scale_and_zero(graph, f"{output.name}_reached", reached),
    ]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        assert node.inputs[2].const_value is not None
        steps = scale.astype(np.float64) * float(x_scale.const_value.numpy())
        bias = np.rint(node.inputs[2].const_value.numpy() / steps).clip(-(2**31), 2**31 - 1).astype(np.int32)
        stored.append(_initializer(graph, f"{node.name}_bias_int32", bias))
    inputs = [x, x_scale, x_zero, *stored]
    made = ir.node("QLinearConv", inputs, attributes=dict(node.attributes), name=f"{node.name}_qlinearconv")
    back = ir.node("DequantizeLinear", [made.outputs[0], *stored[3:5]], name=f"{node.name}_dequantizelinear")
    for item, dtype in ((made, ir.DataType.UINT8), (back, ir.DataType.FLOAT)):
        item.outputs[0].name, item.outputs[0].dtype = f"{output.name}_{item.op_type.lower()}", dtype
        item.outputs[0].shape = output.shape
    old = [value for value in node.inputs[1:] if value is not None]
    ir.convenience.replace_nodes_and_values(graph, node, [node], [made, back], [output], [back.outputs[0]])
    for value in old:
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(str(value.name), None)
    return back.outputs[0]


def _scale_and_zero(graph: ir.Graph, name: str, reached: tuple[np.ndarray, np.ndarray]) -> tuple[ir.Value, ir.Value]:
    """Initializers of the step and zero point of activations between these two numbers."""
    from onnxruntime.quantization.quant_utils import compute_scale_zp

    zero_point, step = compute_scale_zp(*reached, np.uint8(0), np.uint8(255))
    scale = _initializer(graph, f"{name}_scale", np.asarray(step, np.float32))
    return scale, _initializer(graph, f"{name}_zero_point", np.asarray(zero_point, np.uint8))


def _constant_scales(graph: ir.Graph, values: Mapping[str, ir.Value], ranges: Ranges) -> dict[tuple[ir.Graph, ir.Value], Any]:
    """Quantize each activation that has a range, behind where it is made; returns it as ``_replace`` takes it."""
    import onnx_ir as ir

    found: dict[tuple[ir.Graph, ir.Value], Any] = {}
    for name, x in values.items():
        if name not in ranges:
            continue
        scale, zero = _scale_and_zero(graph, name, ranges[name])
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
