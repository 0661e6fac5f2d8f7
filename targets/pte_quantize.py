"""int8 by PT2E: per-channel weights, activations quantized as they come, by torchao's quantizer for XNNPACK."""

from __future__ import annotations

import dataclasses

import torch
from torch.export import Dim
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

from sam3x.passes.cond_graph import aten, expression
from sam3x.program import CapturedProgram
from sam3x.samples import trace_sizes


def quantize(captured: CapturedProgram) -> CapturedProgram:
    """Every projection's weight in int8; ``captured`` is left as it is.

    Weights are symmetric, one scale a row; activations are asymmetric and measured at run time, XNNPACK does it row by row. The
    products of attention and the rows of 1/n that are a norm's mean stay float32.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    quantizer.set_filter_function(_is_projection)
    module = captured.program.module(check_guards=False)
    prepared = prepare_pt2e(module, quantizer)
    _observe_weights(prepared)
    converted = convert_pt2e(prepared)
    return _again(captured, converted)


def _is_projection(node: Node) -> bool:
    if node.target is not aten.linear.default:
        return True
    weight = node.args[1].meta["val"]
    return weight.shape[0] > 1


def _observe_weights(prepared: GraphModule) -> None:
    for node in prepared.graph.nodes:
        if node.op == "call_module" and node.args[0].op == "get_attr":
            value = prepared
            for name in str(node.args[0].target).split("."):
                value = getattr(value, name)
            prepared.get_submodule(str(node.target))(value)


def _again(captured: CapturedProgram, module: GraphModule) -> CapturedProgram:
    """Export the quantized module with the inputs and the dynamic sizes of the one before."""
    inputs = {node.name: node.meta["val"] for node in captured.program.graph.nodes if node.name in captured.input_names}
    dims = [_dims(inputs[name], captured) for name in captured.input_names]
    sizes = trace_sizes(captured.spec)
    examples = []
    for name, known in zip(captured.input_names, dims, strict=True):
        shape = [getattr(sizes, known[i]) if i in known else int(size) for i, size in enumerate(inputs[name].shape)]
        examples.append(torch.zeros(shape, dtype=inputs[name].dtype))
    dynamic = tuple(dict.fromkeys(known, Dim.DYNAMIC) for known in dims)
    with torch.no_grad():
        program = torch.export.export(module, tuple(examples), dynamic_shapes=dynamic)
    given = [item.arg.name for item in program.graph_signature.input_specs if item.kind is InputKind.USER_INPUT]
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.name in given}
    names = {str(expression(values[n].shape[i])): known[i] for n, known in zip(given, dims, strict=True) for i in known}
    return dataclasses.replace(captured, program=program, dim_names=names)


def _dims(value: torch.Tensor, captured: CapturedProgram) -> dict[int, str]:
    """Dimension → what it means, for the dynamic ones."""
    names = [captured.dim_names.get(str(expression(size))) for size in value.shape]
    return {index: name for index, name in enumerate(names) if name is not None}
