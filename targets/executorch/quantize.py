"""int8 by PT2E: per-channel weights, activations quantized as they come, by ExecuTorch's quantizer for XNNPACK."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch.export import Dim
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

from sam3x.capture.program import CapturedProgram
from sam3x.passes.graph.aten_nodes import aten, expression
from sam3x.passes.precision.autocast import worth_int8
from sam3x.targets.quiet import suppressed_output


def quantize(captured: CapturedProgram) -> CapturedProgram:
    """Every projection's weight in int8; ``captured`` is left as it is.

    Weights are symmetric, one scale a row; activations are asymmetric and measured at run time, which XNNPACK does row by row.
    The products of attention, small heads and the rows of 1/n that are a norm's mean stay float32.
    """
    with suppressed_output():
        return _quantized(captured)


def _quantized(captured: CapturedProgram) -> CapturedProgram:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    class Quantizer(XNNPACKQuantizer):
        def transform_for_annotation(self, model: GraphModule) -> GraphModule:
            """Leave numbers as they are: as float32 tensors they make floats of the whole numbers that they are added to."""
            return model

    quantizer = Quantizer().set_global(_config()).set_filter_function(_is_projection)
    prepared = prepare_pt2e(captured.program.module(check_guards=False), quantizer)
    _observe_weights(prepared)
    return _again(captured, convert_pt2e(prepared))


def _config() -> Any:
    """Dynamic and per channel, without the lower end of a weight's scale, 2⁻¹², which small weights would be coarse at."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import get_symmetric_quantization_config
    from torchao.quantization.pt2e import PerChannelMinMaxObserver

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    observer = PerChannelMinMaxObserver.with_args(eps=torch.finfo(torch.float32).eps)
    return dataclasses.replace(config, weight=dataclasses.replace(config.weight, observer_or_fake_quant_ctr=observer))


def _is_projection(node: Node) -> bool:
    if node.target is not aten.linear.default:
        return False
    weight = cast("Node", node.args[1])
    shape = weight.meta["val"].shape
    own = "." in str(weight.target)  # what passes add is of no module: a part of a projection, a mean
    return worth_int8(shape) if own else shape[0] > 1


def _observe_weights(prepared: GraphModule) -> None:
    """Activations are measured at run time, so weights are all there is to observe and nothing need be run."""
    for node in prepared.graph.nodes:
        if node.op == "call_module" and node.args[0].op == "get_attr":
            value: Any = prepared
            for name in str(node.args[0].target).split("."):
                value = getattr(value, name)
            prepared.get_submodule(str(node.target))(value)


def _again(captured: CapturedProgram, module: GraphModule) -> CapturedProgram:
    """Export the quantized module with the inputs and the dynamic sizes of the one before."""
    before = {node.name: node.meta["val"] for node in captured.program.graph.nodes if node.name in captured.input_names}
    dims = [_dims(before[name], captured) for name in captured.input_names]
    given = captured.samples[0].inputs
    examples = tuple(_doubled(given[name], known) for name, known in zip(captured.input_names, dims, strict=True))
    with torch.no_grad():
        program = torch.export.export(
            module, examples, dynamic_shapes=tuple(dict.fromkeys(known, Dim.DYNAMIC) for known in dims)
        )
    inputs = [item.arg.name for item in program.graph_signature.input_specs if item.kind is InputKind.USER_INPUT]
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.name in inputs}
    names = {
        str(expression(values[name].shape[dim])): meaning
        for name, known in zip(inputs, dims, strict=True)
        for dim, meaning in known.items()
    }
    return dataclasses.replace(captured, program=program, dim_names=names)


def _doubled(value: torch.Tensor, dynamic: dict[int, str]) -> torch.Tensor:
    """``value`` with no dynamic size of one, which torch.export takes for a constant."""
    return value.repeat([2 if dim in dynamic and size == 1 else 1 for dim, size in enumerate(value.shape)]).contiguous()


def _dims(value: torch.Tensor, captured: CapturedProgram) -> dict[int, str]:
    """Dimension → what it means, for the dynamic ones."""
    names = [captured.dim_names.get(str(expression(size))) for size in value.shape]
    return {index: name for index, name in enumerate(names) if name is not None}
