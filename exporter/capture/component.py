"""A component in, an ``ExportedProgram`` out that passes and targets take like the fusion encoder's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from sam3x.capture.capture import capture_encoder, free_layouts, rename_input, user_placeholders
from sam3x.capture.decompose import decomposed
from sam3x.capture.program import CapturedProgram, Sample
from sam3x.capture.refusal import refusal
from sam3x.capture.watch import traced
from sam3x.errors import CaptureError
from sam3x.fusion.ambient import settled
from sam3x.fusion.encoder import FusionEncoder
from sam3x.fusion.shadow import attributes_kept
from sam3x.sources.contract import Component, Port


@settled()  # with gradients, decompositions meet strides they refuse
def capture_component(component: Component, sample: Sample) -> CapturedProgram:
    """Export a component with its named dimensions dynamic.

    Args:
        sample: one tensor an input; dynamic sizes of 1 are doubled, as torch.export takes 1 for a constant.

    Raises:
        CaptureError: torch.export refused the module, or baked in a dimension that must be dynamic.
    """
    if isinstance(component.module, FusionEncoder):
        return capture_encoder(component.module)
    names = tuple(port.name for port in component.inputs)
    free = {dim for dim, (low, high) in component.ranges.items() if low != high}
    dynamic = tuple({i: Dim.DYNAMIC for i, dim in enumerate(p.dims) if dim in free} or None for p in component.inputs)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention's fused kernel is opaque to every pass
    args = tuple(_example(sample.inputs[port.name], port, free) for port in component.inputs)
    whole = _Positional(component.module)

    def run() -> ExportedProgram:
        program = decomposed(torch.export.export(whole, args, dynamic_shapes=(dynamic,), strict=False))
        free_layouts(program.graph_module)
        return program

    given = zip(component.inputs, args, strict=True)
    traced_at = {dim: size for port, value in given for dim, size in zip(port.dims, value.shape, strict=True) if dim in free}
    remedy = "Its code must read sizes from its tensors' shapes."
    try:
        program = traced(whole, run, traced_at, lambda error: refusal(f"the {component.name}", error, remedy))
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    dims: dict[str, str] = {}
    for node, port in zip(user_placeholders(program), component.inputs, strict=True):
        rename_input(program, node, port.name)
        for index, meaning in enumerate(port.dims):
            size = node.meta["val"].shape[index]
            if meaning in free and isinstance(size, int):
                raise CaptureError(
                    f"the {component.name} bakes in '{meaning}' at {size} (dimension {index} of '{port.name}')",
                    remedy="Its code must read that size from the tensor's shape.",
                )
            if meaning in free:
                dims[str(size)] = str(meaning)
    program.graph_module.recompile()
    return CapturedProgram(
        program=program,
        input_names=names,
        output_names=component.outputs,
        dim_names=dims,
        samples=(sample,),
        eager=component.eager,
        exact=component.eager_double,
        ranges=dict(component.ranges),
        scaled=component.scaled,
    )


def _example(value: Tensor, port: Port, free: set[str]) -> Tensor:
    ones = [2 if dim in free and size == 1 else 1 for dim, size in zip(port.dims, value.shape, strict=True)]
    return value.repeat(ones).contiguous()


class _Positional(torch.nn.Module):
    """``forward(*tensors)``, so that one tuple of dynamic shapes fits every component."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with attributes_kept(self.module):
            return self.module(*tensors)
