"""Weights and arithmetic in float16, the interface in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from sam3x.passes.base import Pass, PassResult
from sam3x.passes.graph.cond_graph import Builder, aten, fake_mode_of, quietly
from sam3x.passes.graph.constants import Constants
from sam3x.passes.precision.convert_precision import clamp_numbers, lowered


class ConvertToHalfPass(Pass):
    """Every float32 weight and value becomes float16; inputs are converted once as they come in, outputs as they leave.

    Last of the passes: the float32 numbers in the graph (a mask's lowest value) must be ones that float16 has.
    """

    name = "convert_to_half"

    def call(self, program: ExportedProgram) -> PassResult:
        graph, fake_mode = program.graph_module.graph, fake_mode_of(program.graph_module)
        constants = Constants(program, fake_mode)
        rewrites = 0
        inputs = {item.arg.name for item in program.graph_signature.input_specs if item.kind is InputKind.USER_INPUT}
        body = next(node for node in graph.nodes if node.op != "placeholder")
        for node in [node for node in graph.nodes if node.op == "placeholder" and _is_float(node) and node.users]:
            if node.name in inputs:
                readers = [reader for reader in node.users if not _is_bool(reader)]  # compared as it came in
                half = Builder(graph, body, fake_mode)(aten._to_copy.default, node, dtype=torch.float16)
            else:
                value = constants.value(node)
                assert value is not None
                readers, half = list(node.users), constants.add(lowered(value, torch.float16), node.name.removeprefix("p_"))
            for reader in readers:
                if reader.op != "output":
                    reader.replace_input_with(node, half)
                    rewrites += 1
        for node in list(graph.nodes):
            if node.op == "call_function" and not (node.target is aten._to_copy.default and _is_float(node.args[0])):
                if _is_float(node):
                    clamp_numbers(node, torch.float16)
                if node.kwargs.get("dtype") is torch.float32:
                    node.kwargs = {**node.kwargs, "dtype": torch.float16}
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda item: item.meta["val"])
                with quietly(fake_mode):
                    node.meta["val"] = node.target(*args, **kwargs)
        output = graph.output_node()
        emit = Builder(graph, output, fake_mode)
        results: list[Any] = list(output.args[0])
        for index, node in enumerate(results):
            if isinstance(node, Node) and node.meta["val"].dtype is torch.float16:
                results[index] = emit(aten._to_copy.default, node, dtype=torch.float32)
        output.args = (tuple(results),)
        constants.drop_unused()
        return PassResult(rewrites=rewrites)


def _is_float(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32


def _is_bool(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool
