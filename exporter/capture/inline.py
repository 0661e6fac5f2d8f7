"""Put copies of the traced layers where ``sam3x::fusion_layer`` stands in the encoder's graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.value_ranges import ValueRanges

from sam3x.capture.decompose import ORIGIN
from sam3x.capture.program import erase_dead, sync_outputs
from sam3x.errors import CaptureError
from sam3x.fusion.layer_op import LAYER_OP
from sam3x.fusion.layer_template import LayerTemplate


def inline_layers(shell: ExportedProgram, templates: Mapping[int, LayerTemplate]) -> None:
    """Replace every layer operator of ``shell``, in place.

    Args:
        shell: the encoder's program; weights are placeholders and operands of the operators.
        templates: the operator's ``index`` → the traced layer.

    Raises:
        CaptureError: a layer bakes in a size that must stay dynamic, or changes ``tgt``'s shape.
    """
    module = shell.graph_module
    for node in [n for n in module.graph.nodes if n.op == "call_function" and n.target is LAYER_OP]:
        inputs, weights, index = node.args
        _Inliner(shell, node, index, templates[index]).run(inputs, weights)
    erase_dead(module)
    module.graph.lint()
    module.recompile()
    sync_outputs(shell)
    shell.validate()


class _Inliner:
    """One copy of one template: its nodes, sub-graphs, constants, and fake tensors in the shell's symbols."""

    def __init__(self, shell: ExportedProgram, node: Node, index: int, template: LayerTemplate) -> None:
        self.shell, self.node, self.index, self.template = shell, node, index, template
        self.module: GraphModule = shell.graph_module
        self.fake_mode = node.meta["val"].fake_mode
        self.shape_env: ShapeEnv = self.fake_mode.shape_env
        self.template_env = next(n for n in template.program.graph.nodes if "val" in n.meta).meta["val"].fake_mode.shape_env
        self.symbols: dict[sympy.Symbol, sympy.Expr] = {}
        self.nodes: dict[Node, Node] = {}
        self.values: dict[object, torch.Tensor] = {}

    def run(self, inputs: list[Node], weights: list[Node]) -> None:
        program = self.template.program
        by_name = {name: weights[position] for name, position in self.template.weights.items()}
        remaining = iter(inputs)
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        for placeholder, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                self.nodes[placeholder] = next(remaining)
                self._bind(placeholder)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and str(spec.target).startswith("layer."):
                self.nodes[placeholder] = by_name[str(spec.target).removeprefix("layer.")]
            else:
                self.nodes[placeholder] = self._constant(spec, placeholder)
        with self.module.graph.inserting_before(self.node):
            output = self._copy_body()
        before, after = self.node.meta["val"], output.meta["val"]
        if tuple(before.shape) != tuple(after.shape) or before.dtype != after.dtype:
            raise CaptureError(
                f"it maps tgt {tuple(before.shape)} {before.dtype} to {tuple(after.shape)} {after.dtype}",
                subject=f"layer {self.index}",
                remedy="A fusion layer must keep tgt's shape and dtype.",
            )
        self.node.replace_all_uses_with(output)
        self.module.graph.erase_node(self.node)

    def _bind(self, placeholder: Node) -> None:
        """Learn what the template's symbols are in the shell."""
        outer = self.nodes[placeholder].meta["val"]
        for dim, (inner, size) in enumerate(zip(placeholder.meta["val"].shape, outer.shape, strict=True)):
            if isinstance(inner, torch.SymInt) and isinstance(inner.node.expr, sympy.Symbol):
                self.symbols.setdefault(
                    inner.node.expr, size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
                )
            elif isinstance(inner, int) and not isinstance(size, int):
                raise CaptureError(
                    f"it bakes in size {inner} of dimension {dim} of '{self.nodes[placeholder].name}'",
                    subject=f"layer {self.index}",
                    remedy="Make the module read it from the tensor's shape, or fix that size (for instance --tokens 5184).",
                )

    def _constant(self, spec: InputSpec, placeholder: Node) -> Node:
        """A tensor the layer's code made itself becomes a constant of the shell."""
        source = self.template.program
        value = {**source.state_dict, **source.constants}[str(spec.target)]
        target = f"layer_{self.index}_{str(spec.target).replace('.', '_')}"
        first = next(n for n in self.module.graph.nodes if n.op == "placeholder")
        with self.module.graph.inserting_before(first):
            new = self.module.graph.placeholder(target)
        new.meta.update(val=self.fake_mode.from_tensor(value), tensor_meta=placeholder.meta.get("tensor_meta"))
        self.shell.graph_signature.input_specs.insert(
            0, InputSpec(kind=InputKind.CONSTANT_TENSOR, arg=TensorArgument(name=new.name), target=target)
        )
        self.shell.constants[target] = value
        return new

    def _copy_body(self) -> Node:
        source = self.template.program.graph_module
        for node in source.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return self.nodes[node.args[0][0]]
            if node.target is torch.ops.aten._assert_scalar.default:
                continue  # tracing's own assumptions: dac's half is 1 at batch 2, and right there
            new = self.module.graph.node_copy(node, lambda n: self.nodes[n])
            new.meta = self._meta(node.meta)
            if node.op == "get_attr":
                new.target = self._graft(str(node.target), getattr(source, str(node.target)))
            self.nodes[node] = new
        raise AssertionError("a graph without output")

    def _graft(self, name: str, value: Any) -> str:
        """Attach a branch's sub-graph (or a tensor) under a free name."""
        free = f"layer_{self.index}_{name}"
        if isinstance(value, GraphModule):
            value = copy.deepcopy(value)
            for _, part in value.named_modules():
                for node in part.graph.nodes if isinstance(part, GraphModule) else ():
                    node.meta = self._meta(node.meta)
        setattr(self.module, free, value)
        return free

    def _meta(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """A node's metadata in the shell's symbols; conditionals that make a size get a new unbacked one."""
        kept = {k: v for k, v in meta.items() if k in ORIGIN}
        bindings = meta.get("unbacked_bindings")
        if bindings:
            for symbol in bindings:
                if symbol not in self.symbols:
                    with self.shape_env.ignore_fresh_unbacked_symbols():  # bound to the node below, not to a running trace
                        fresh = self.shape_env.create_unbacked_symint()
                    self.symbols[symbol] = fresh.node.expr
                    self.shape_env.var_to_range[fresh.node.expr] = self._range(symbol)
            kept["unbacked_bindings"] = {self.symbols[symbol]: path for symbol, path in bindings.items()}
        if "val" in meta:
            kept["val"] = torch.utils._pytree.tree_map(self._value, meta["val"])
        return kept

    def _range(self, symbol: sympy.Symbol) -> ValueRanges:
        """As traced; but half of a size that is fixed in the shell may be 1, and 2 would then be the only value left."""
        bounds = self.template_env.var_to_range[symbol]
        fixed = any(isinstance(expression, sympy.Integer) for expression in self.symbols.values())
        return ValueRanges(1, bounds.upper) if fixed else bounds

    def _value(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if not isinstance(value, torch.Tensor):
            return value
        sizes = (*value.shape, *value.stride())
        key = (*(s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes), value.dtype, value.device)
        if key not in self.values:
            shape, stride = ([self._size(s) for s in sizes] for sizes in (value.shape, value.stride()))
            with self.fake_mode:
                self.values[key] = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        return self.values[key]

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expression = size.node.expr.xreplace(self.symbols)
        if isinstance(expression, sympy.Integer):
            return int(expression)
        return self.shape_env.create_symintnode(expression, hint=None)
