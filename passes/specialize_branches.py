"""Flags that are given a value fold their conditionals away: constant propagation through ``torch.cond``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from sam3x.errors import SpecError
from sam3x.passes.base import Exactness, Pass, PassResult
from sam3x.passes.cond_graph import (
    Cond,
    aten,
    expression,
    fake_mode_of,
    inline,
    is_cond,
    outputs,
    own_branches,
    placeholders,
    read_cond,
    replace_results,
    substitute,
    sweep,
)

_STEP = "step 3/4 passes: specialize_branches:"
_DONE = "sam3x.specialized_flags"
_SAME = {aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.contiguous.default}
_UNARY: dict[Any, Callable[[bool], bool]] = {
    aten.logical_not.default: lambda a: not a,
    aten.bitwise_not.default: lambda a: not a,
}
_BINARY: dict[Any, Callable[[bool, bool], bool]] = {
    aten.logical_xor.default: lambda a, b: a != b,
    aten.bitwise_xor.Tensor: lambda a, b: a != b,
    aten.ne.Tensor: lambda a, b: a != b,
    aten.eq.Tensor: lambda a, b: a == b,
}
_AND, _OR = {aten.logical_and.default, aten.bitwise_and.Tensor}, {aten.logical_or.default, aten.bitwise_or.Tensor}


class SpecializeBranchesPass(Pass):
    """Give flag inputs a value: the branches taken stand inline, the others are gone with the weights only they used.

    Args:
        values: user input (a bool scalar) → its value. The input leaves the graph and the signature.

    Raises:
        SpecError: (from ``call``) an unknown input, one that is no bool scalar, or one that was given the other value before.
    """

    name = "specialize_branches"
    exactness = Exactness.BIT_EXACT

    def __init__(self, values: Mapping[str, bool]) -> None:
        self.values = {name: bool(value) for name, value in values.items()}

    def call(self, program: ExportedProgram) -> PassResult:
        flags = self._flags(program)
        root = program.graph_module
        folder = _Folder(program)
        folder.run(root, flags)
        modified = bool(flags) or folder.rewrites > 0
        if modified:
            sweep(root)
            for flag in flags:
                _remove_input(program, flag)
            _remove_unused_weights(program)
            root.recompile()
            root.meta[_DONE] = {**root.meta.get(_DONE, {}), **{flag.name: value for flag, value in flags.items()}}
        return PassResult(program=program, modified=modified, rewrites=folder.rewrites)

    def _flags(self, program: ExportedProgram) -> dict[Node, bool]:
        inputs = {node.name: node for node in _user_placeholders(program)}
        done: Mapping[str, bool] = program.graph_module.meta.get(_DONE, {})
        flags: dict[Node, bool] = {}
        for name, value in self.values.items():
            if name not in inputs and name in done:
                if done[name] is not value:
                    raise SpecError(f"{_STEP} '{name}' is {done[name]} in this program already. Export it anew.")
                continue
            if name not in inputs:
                known = ", ".join(n for n, node in inputs.items() if _is_flag(node)) or "none"
                raise SpecError(f"{_STEP} no input '{name}'. Flags of this program: {known}.")
            if not _is_flag(inputs[name]):
                value_ = inputs[name].meta["val"]
                raise SpecError(
                    f"{_STEP} '{name}' is {tuple(value_.shape)} {value_.dtype}, no bool scalar. Leave it at runtime."
                )
            flags[inputs[name]] = value
        return flags

    def input_names(self, names: Sequence[str]) -> tuple[str, ...]:
        """The program's input names after the pass."""
        return tuple(name for name in names if name not in self.values)


def _is_flag(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool and value.dim() == 0


def _user_placeholders(program: ExportedProgram) -> list[Node]:
    wanted = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]


class _Folder:
    """Walks graphs in order with what is known of each bool, branches after the graph that holds them."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program, self.root, self.rewrites = program, program.graph_module, 0

    def run(self, module: GraphModule, known: Mapping[Node, bool]) -> None:
        own_branches(module)  # what holds for the operands of one conditional need not hold for another's
        values: dict[Node, bool] = dict(known)
        node = next(iter(module.graph.nodes))
        while node.op != "root":
            following = node.next
            if is_cond(node):
                following = self._cond(module, read_cond(module, node), values)
            elif (value := _fold(node, values)) is not None:
                values[node] = value
            node = following
        _materialize(module, values, self.program if module is self.root else None)
        module.recompile()

    def _cond(self, module: GraphModule, cond: Cond, values: Mapping[Node, bool]) -> Node:
        """Inline the branch taken, or go into both; returns the node to go on with."""
        predicate = cond.predicate if isinstance(cond.predicate, bool) else values.get(cond.predicate)
        if predicate is None:
            for branch in cond.branches:
                inner = zip(placeholders(branch), cond.operands, strict=True)
                self.run(branch, {item: values[operand] for item, operand in inner if operand in values})
            return cond.node.next
        before = cond.node.prev
        taken = cond.branches[0 if predicate else 1]
        symbols = _resolved(cond.node, taken)
        results = inline(module, taken, cond.operands, cond.node)
        replace_results(self.program if module is self.root else None, cond.node, results)
        substitute(self.root, symbols)
        self.rewrites += 1
        return before.next  # the inlined nodes come next: a nested conditional may fold as well


def _resolved(node: Node, taken: GraphModule) -> dict[Any, Any]:
    """The sizes that only a run would tell, known now that the branch is."""
    symbols: dict[Any, Any] = {}
    returned = outputs(taken)
    for before, after in zip(node.meta["val"], returned, strict=True):
        if isinstance(before, torch.Tensor) and isinstance(after, Node):
            now = after.meta["val"]
            pairs = zip((*before.shape, *before.stride()), (*now.shape, *now.stride()), strict=True)
        elif isinstance(before, torch.SymInt):
            pairs = zip([before], [after.meta["val"] if isinstance(after, Node) else after], strict=True)
        else:
            continue
        for old, new in pairs:
            if expression(old) in node.meta.get("unbacked_bindings", {}):
                symbols.setdefault(expression(old), expression(new))
    return symbols


def _fold(node: Node, values: Mapping[Node, bool]) -> bool | None:
    """The bool scalar that ``node`` must be, or None."""
    if node.op != "call_function" or not _is_flag(node):
        return None
    target: Any = node.target
    if target in (aten.full.default, aten.scalar_tensor.default):
        value = node.args[0] if target is aten.scalar_tensor.default else node.args[1]
        return bool(value) if isinstance(value, (bool, int)) else None
    args = [values.get(item) if isinstance(item, Node) else item if isinstance(item, bool) else None for item in node.args]
    if target in _SAME:
        return args[0]
    if target in _UNARY and args[0] is not None:
        return _UNARY[target](args[0])
    if target in _AND | _OR:
        strong = target in _OR  # one True settles an or, one False an and
        if strong in args:
            return strong
        return None if None in args else not strong
    if target in _BINARY and None not in args:
        return _BINARY[target](args[0], args[1])  # type: ignore[arg-type]
    return None


def _materialize(module: GraphModule, values: Mapping[Node, bool], program: ExportedProgram | None) -> None:
    """A flag that is still read as a tensor (``where``, an output, a conditional's operand) becomes a constant node."""
    fake_mode, made = fake_mode_of(module), {}
    for node, value in values.items():
        readers = [user for user in node.users if user not in values]
        if not readers or node.target in (aten.full.default, aten.scalar_tensor.default):
            continue
        if value not in made:
            first = next(item for item in module.graph.nodes if item.op != "placeholder")
            like = node.meta["val"]
            with module.graph.inserting_before(first), fake_mode:
                made[value] = module.graph.call_function(
                    aten.full.default, ([], value), {"dtype": torch.bool, "device": like.device, "pin_memory": False}
                )
                made[value].meta["val"] = torch.full([], value, dtype=torch.bool, device=like.device)
        for reader in readers:
            reader.replace_input_with(node, made[value])
        if program is not None and any(reader.op == "output" for reader in readers):
            for item in program.graph_signature.output_specs:
                if item.arg.name == node.name:
                    item.arg.name = made[value].name


def _remove_input(program: ExportedProgram, node: Node) -> None:
    """Take a user input out of the graph, the signature and the calling convention."""
    position = program.graph_signature.user_inputs.index(node.name)
    program.graph.erase_node(node)
    specs = program.graph_signature.input_specs
    specs[:] = [item for item in specs if item.kind is not InputKind.USER_INPUT or item.arg.name != node.name]
    for entry in program.module_call_graph:
        if entry.fqn == "" and entry.signature is not None:
            before = entry.signature.in_spec
            entry.signature.in_spec = _without_leaf(before, position)
            names = entry.signature.forward_arg_names
            if names is not None and len(names) == before.num_leaves:  # one name an argument: each is a tensor
                entry.signature.forward_arg_names = [name for i, name in enumerate(names) if i != position]
    if program.example_inputs is not None:
        leaves, spec = pytree.tree_flatten(program.example_inputs)
        rest = [leaf for i, leaf in enumerate(leaves) if i != position]
        program._example_inputs = pytree.tree_unflatten(rest, _without_leaf(spec, position))


_GONE = object()


def _without_leaf(spec: Any, position: int) -> Any:
    """The tree without one leaf; the tuple, list or dict that held it gets shorter."""
    leaves = [_GONE if i == position else i for i in range(spec.num_leaves)]

    def prune(value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(prune(item) for item in value if item is not _GONE)
        if type(value) is dict:
            return {key: prune(item) for key, item in value.items() if item is not _GONE}
        return value

    shorter = pytree.tree_structure(prune(pytree.tree_unflatten(leaves, spec)))
    if shorter.num_leaves != spec.num_leaves - 1:
        raise SpecError(f"{_STEP} the flag is part of {spec}. Pass it as an argument of its own.")
    return shorter


def _remove_unused_weights(program: ExportedProgram) -> None:
    """Weights nobody reads leave the graph, the signature and a new ``state_dict``; the caller's dict stays as it is."""
    signature = program.graph_signature
    changing = set(signature.buffers_to_mutate.values())
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    kept = []
    for item in signature.input_specs:
        weight = item.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        if weight and item.target not in changing and not nodes[item.arg.name].users:
            program.graph.erase_node(nodes[item.arg.name])
        else:
            kept.append(item)
    signature.input_specs[:] = kept
    targets = {item.target for item in kept}
    program._state_dict = {name: value for name, value in program.state_dict.items() if name in targets}
    tensors = {n: v for n, v in program.constants.items() if n in targets or not isinstance(v, torch.Tensor)}
    program._constants = tensors
