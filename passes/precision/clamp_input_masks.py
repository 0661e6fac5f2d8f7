"""Float masks that a caller gives, made ones that a lower precision has."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from sam3x.passes.base import Pass, PassResult
from sam3x.passes.graph.aten_nodes import aten
from sam3x.passes.graph.emitter import Emitter


class ClampInputMasksPass(Pass):
    """In a float32 input that is a mask, what is finite and below ``dtype`` → the lowest number of ``dtype``; −∞ stays.

    ``torch.finfo(torch.float32).min`` hides a key less than −∞ does: a row of it is finite. As an input that becomes float16 it
    would be −∞, and a row of −∞ is NaN. Numbers that the graph itself fills are clamped where they are converted
    (``convert_precision.clamp_numbers``).
    """

    name = "clamp_input_masks"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def call(self, program: ExportedProgram) -> PassResult:
        graph = program.graph_module.graph
        inputs = {item.arg.name for item in program.graph_signature.input_specs if item.kind is InputKind.USER_INPUT}
        rewrites = 0
        first = next(node for node in graph.nodes if node.op != "placeholder")
        for node in [node for node in graph.nodes if node.op == "placeholder" and node.name in inputs]:
            readers = [reader for reader in node.users if reader.op != "output"]
            known = any(reader.target is aten.isinf.default for reader in readers)
            if not node.name.endswith("mask") or node.meta["val"].dtype is not torch.float32 or not readers or known:
                continue
            emit = Emitter(program.graph_module, first)
            clamped = emit(aten.clamp.default, node, torch.finfo(self.dtype).min)
            held = emit(aten.where.self, emit(aten.isinf.default, node), node, clamped)
            for reader in readers:
                reader.replace_input_with(node, held)
            rewrites += 1
        return PassResult(rewrites=rewrites)
