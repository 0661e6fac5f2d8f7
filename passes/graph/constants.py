"""Weights of an exported program: read them, add new ones, drop those nothing reads."""

from __future__ import annotations

import hashlib

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

_LIFTED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class Constants:
    """The lifted tensors of one program. The program's own dictionaries are replaced, never written into: copies share them."""

    def __init__(self, program: ExportedProgram, fake_mode: torch._subclasses.FakeTensorMode) -> None:
        self.program, self.fake_mode = program, fake_mode
        program._state_dict, program._constants = dict(program.state_dict), dict(program.constants)
        tensors = {**program.constants, **program.state_dict}
        self._values: dict[str, torch.Tensor] = {
            item.arg.name: tensors[item.target]
            for item in program.graph_signature.input_specs
            if item.kind in _LIFTED and item.target in tensors
        }
        self._known: dict[tuple[str, torch.Size, torch.dtype], Node] = {}

    def value(self, node: object) -> torch.Tensor | None:
        """The tensor of a placeholder; None for any other node."""
        return self._values.get(node.name) if isinstance(node, Node) and node.op == "placeholder" else None

    def add(self, value: torch.Tensor, hint: str) -> Node:
        """A placeholder that holds ``value``; equal tensors share one."""
        value = value.detach().contiguous()
        digest = hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        key = (digest, value.shape, value.dtype)
        if key in self._known:
            return self._known[key]
        graph = self.program.graph_module.graph
        first = next(iter(graph.nodes))
        with graph.inserting_before(first):
            node = graph.placeholder(f"p_{hint}")
        node.target = node.name
        node.meta["val"] = self.fake_mode.from_tensor(value, static_shapes=True)
        name = node.name.removeprefix("p_")
        # torch.onnx names a weight after its target and everything else after its node: a buffer's node may have the name
        taken = {*self.program._state_dict, *(item.name for item in graph.nodes)}
        while name in taken:
            name += "_"
        spec = InputSpec(InputKind.PARAMETER, TensorArgument(name=node.name), name)
        self.program.graph_signature.input_specs.insert(0, spec)
        self.program._state_dict[name] = torch.nn.Parameter(value, requires_grad=False)
        self._values[node.name] = value
        self._known[key] = node
        return node

    def drop_unused(self) -> int:
        """Remove lifted tensors that no node reads; returns how many."""
        signature, graph = self.program.graph_signature, self.program.graph_module.graph
        nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
        kept = []
        dropped = 0
        for item in signature.input_specs:
            if item.kind in _LIFTED and not nodes[item.arg.name].users:
                graph.erase_node(nodes[item.arg.name])
                self._values.pop(item.arg.name, None)
                dropped += 1
            else:
                kept.append(item)
        signature.input_specs[:] = kept
        held = {item.target for item in kept}
        self.program._state_dict = {name: value for name, value in self.program._state_dict.items() if name in held}
        self.program._constants = {name: value for name, value in self.program._constants.items() if name in held}
        return dropped
