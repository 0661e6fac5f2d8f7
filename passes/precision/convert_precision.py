"""A graph in float32 to one that computes in float16 or bfloat16, less the operations that stay in float32."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

from sam3x.errors import PreconditionError
from sam3x.passes.base import Pass, PassResult, graph_modules
from sam3x.passes.graph.aten_nodes import FILLS, NOOPS, PERMUTES, RESHAPES, SDPA, argument, aten
from sam3x.passes.graph.cond_graph import is_cond, outputs, placeholders, read_cond
from sam3x.passes.graph.constants import Constants
from sam3x.passes.graph.emitter import Emitter, fake_mode_of, following, quietly
from sam3x.passes.graph.op_paths import IDLE, idle, matching, op_paths

MOVES = RESHAPES | PERMUTES | NOOPS | {aten.select.int, aten.slice.Tensor, aten.split_with_sizes.default, aten.unbind.int}
MOVES |= {aten.cat.default, aten.where.self, aten.relu.default, aten.constant_pad_nd.default, aten.flatten.using_ints}
MOVES |= {operator.getitem}
"""What only moves or picks numbers: done in the widest dtype of what it is given, so that it rounds nothing."""

_RANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}
"""What counts: in float32, as float16 counts to 2,048."""


_ARITHMETIC = {aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.mul.Scalar, aten.add.Scalar, aten.sub.Scalar}
_FILLING = {*FILLS, aten.clamp.default, aten.constant_pad_nd.default, aten.masked_fill.Scalar, *_ARITHMETIC}


def clamp_numbers(node: Node, dtype: torch.dtype) -> None:
    """What a node fills, adds or multiplies with, as near as ``dtype`` has it: the lowest float32 is its lowest, not −∞."""
    if node.target in _FILLING:
        node.args = tuple(_in_range(item, dtype) for item in node.args)
        node.kwargs = {name: _in_range(item, dtype) for name, item in node.kwargs.items()}


def _in_range(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    return min(max(value, torch.finfo(dtype).min), torch.finfo(dtype).max)


def lowered(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A constant in ``dtype``; what is finite stays so."""
    bounds = torch.finfo(dtype)
    return torch.where(value.isinf(), value, value.clamp(bounds.min, bounds.max)).to(dtype)


def require_known(program: ExportedProgram, fp32_ops: Sequence[str]) -> None:
    """Raise ``PreconditionError`` for a name that is no operation of ``program``."""
    paths = op_paths(program)
    unknown = matching(paths, fp32_ops)[1]
    if unknown:
        known = sorted({path for path in paths.values() if "." in path})
        shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
        raise PreconditionError(
            f"'{unknown[0]}' {IDLE}",
            subject="--fp32-ops",
            remedy=f"Name one by its kind (layer_norm, attention), by its place ({shown}), or with *.",
        )


class ConvertPrecisionPass(Pass):
    """Every operation computes in ``dtype``; inputs and outputs of the graph stay as they are.

    What only moves numbers rounds nothing. The result runs in eager as it is, which is how its drift is measured.

    Args:
        dtype: ``torch.float16`` or ``torch.bfloat16``.
        fp32_ops: operations that stay in float32, by the names of ``op_paths.matching``.
        stays: tells of a node whether it is float32, as where the back end has it in that alone.
        follows: tells of a node whether it computes in the widest dtype of what it is given, constants aside; None: only what
            moves numbers does, and its constants count, and what is computed of sizes alone is float32.
        shared: whether ``fp32_ops`` are given to several graphs: a name that this one has not is then no fault of it.
    """

    name = "convert_precision"
    run_after = ("canonicalize_attention", "simplify_attention_masks")

    def __init__(
        self,
        dtype: torch.dtype,
        fp32_ops: Sequence[str] = (),
        stays: Callable[[Node], bool] = lambda _: False,
        follows: Callable[[Node], bool] | None = None,
        *,
        shared: bool = False,
    ) -> None:
        self.shared = shared
        self.dtype, self.fp32_ops, self.stays, self.follows = dtype, tuple(fp32_ops), stays, follows

    def requires(self, program: ExportedProgram) -> None:
        if not self.shared:
            require_known(program, self.fp32_ops)

    def call(self, program: ExportedProgram) -> PassResult:
        failures = idle(program, self.fp32_ops)
        if any(value.dtype is self.dtype for value in _float_values(program)):
            return PassResult(match_failures=failures)
        in_float32, _ = matching(op_paths(program), self.fp32_ops)
        in_float32 = {
            *in_float32,
            *(positions(program) if self.follows is None else ()),
            *(node for _, module in graph_modules(program) for node in module.graph.nodes if self.stays(node)),
        }
        rewrites = _Converter(program.graph_module, self.dtype, in_float32, self.follows).run(_constants(program))
        _restore_outputs(program)
        return PassResult(rewrites=rewrites, match_failures=failures)


def positions(program: ExportedProgram) -> set[Node]:
    """What is computed of sizes alone, as encodings of positions: it is float32, and rounded once, where it is used.

    Its sines and cosines would be some 0.002 off if their angles were rounded.
    """
    found: set[Node] = set()
    for node in program.graph.nodes:
        tensors = [item for item in node.all_input_nodes if isinstance(item.meta.get("val"), torch.Tensor)]
        if node.op != "call_function" or node.target in FILLS or is_cond(node):
            continue
        if node.target in _RANGES or (tensors and all(item in found or item.target in FILLS for item in tensors)):
            found.add(node)
    return found


def _constants(program: ExportedProgram) -> set[Node]:
    inputs = {item.arg.name for item in program.graph_signature.input_specs if item.kind is InputKind.USER_INPUT}
    return {node for node in program.graph.nodes if node.op == "placeholder" and node.name not in inputs}


def _float_values(program: ExportedProgram) -> list[torch.Tensor]:
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "call_function"]
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


def _restore_outputs(program: ExportedProgram) -> None:
    """Outputs in float32, as they were."""
    output = program.graph.output_node()
    emit = Emitter(program.graph_module, output)
    halves = (torch.float16, torch.bfloat16)
    values = [
        emit.cast(value, torch.float32) if isinstance(value, Node) and value.meta["val"].dtype in halves else value
        for value in output.args[0]
    ]
    output.args = (tuple(values),)


class _Converter:
    """One graph; branches of a conditional are graphs of their own."""

    def __init__(
        self, module: GraphModule, dtype: torch.dtype, in_float32: set[Node], follows: Callable[[Node], bool] | None
    ) -> None:
        self.module, self.dtype, self.in_float32, self.follows = module, dtype, in_float32, follows
        self.casts: dict[tuple[Node, torch.dtype], Node] = {}
        self.constants: set[Node] = set()
        self.rewrites = 0

    def run(self, constants: set[Node]) -> int:
        """How many operations are in the low precision now. ``constants``: placeholders that hold weights."""
        self.constants = set(constants)
        for node in list(self.module.graph.nodes):
            if node.op != "call_function":
                continue
            if self.follows is not None and _is_constant(node, self.constants):
                self.constants.add(node)
            elif is_cond(node):
                self._branches(node)
            elif _floats(node.meta.get("val")):
                self._convert(node)
        return self.rewrites

    def _convert(self, node: Node) -> None:
        given = [item for item in node.all_input_nodes if _floats(item.meta.get("val"))]
        if node.target in FILLS:
            node.kwargs = {**node.kwargs, "dtype": self.dtype}
            wanted = self.dtype
        elif node.target in _RANGES:
            wanted = node.meta["val"].dtype
        elif self.follows is not None and node not in self.in_float32 and (node.target in MOVES or self.follows(node)):
            wanted = _widest([item for item in given if item not in self.constants])
        elif self.follows is None and node.target in MOVES:
            wanted = _widest(given)
        else:
            wanted = torch.float32 if node in self.in_float32 else self.dtype
            self.rewrites += wanted is self.dtype
        if wanted is self.dtype:
            clamp_numbers(node, wanted)
        if node.target is aten._to_copy.default and node.kwargs.get("dtype") is not None:
            node.kwargs = {**node.kwargs, "dtype": wanted}
        mask = argument(node, 3, "attn_mask") if self.follows is not None and node.target is SDPA else None
        for item in given:
            if node.target is not operator.getitem and item is not mask and item.meta["val"].dtype is not wanted:
                node.replace_input_with(item, self.cast(item, wanted))
        node.meta["val"] = _in(node.meta["val"], wanted)

    def cast(self, value: Node, dtype: torch.dtype) -> Node:
        """``value`` in ``dtype``, once for all that read it."""
        known = self.casts.get((value, dtype))
        if known is None:
            known = Emitter(self.module, following(value)).cast(value, dtype)
            if value.target in FILLS:
                known.target, known.args = value.target, value.args
                known.kwargs = {**value.kwargs, "dtype": dtype}
                clamp_numbers(known, dtype)
            self.casts[value, dtype] = known
        return known

    def _branches(self, node: Node) -> None:
        cond = read_cond(self.module, node)
        for branch in cond.branches:
            constants = set()
            for inner, operand in zip(placeholders(branch), cond.operands, strict=True):
                if isinstance(operand, Node) and _floats(operand.meta.get("val")):
                    inner.meta["val"] = _in(inner.meta["val"], operand.meta["val"].dtype)
                if operand in self.constants:
                    constants.add(inner)
            self.rewrites += _Converter(branch, self.dtype, self.in_float32, self.follows).run(constants)
        kept = []
        for index, pair in enumerate(zip(*(outputs(branch) for branch in cond.branches), strict=True)):
            value = node.meta["val"][index]
            if _floats(value):
                wanted = _widest(list(pair))
                for branch, item in zip(cond.branches, pair, strict=True):
                    if item.meta["val"].dtype is not wanted:
                        _return(branch, index, wanted)
                value = value.to(wanted)
            kept.append(value)
        node.meta["val"] = tuple(kept)
        for user in node.users:
            user.meta["val"] = kept[user.args[1]]


def _return(branch: GraphModule, index: int, dtype: torch.dtype) -> None:
    end, values = branch.graph.output_node(), outputs(branch)
    values[index] = Emitter(branch, end).cast(values[index], dtype)
    end.args = (tuple(values),)


def _floats(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and _floats(value[0])
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _in(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_in(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _is_constant(node: Node, constants: set[Node]) -> bool:
    """Whether it fills, or is made of constants and sizes alone."""
    if not _floats(node.meta.get("val")):
        return False
    tensors = [item for item in node.all_input_nodes if not isinstance(item.meta.get("val"), (int, float, torch.SymInt))]
    return node.target in FILLS or (bool(tensors) and all(item in constants for item in tensors))


def _widest(nodes: list[Node]) -> torch.dtype:
    kinds = {_dtype(node.meta["val"]) for node in nodes}
    return torch.float32 if not kinds or torch.float32 in kinds else kinds.pop()


def _dtype(value: Any) -> torch.dtype:
    return _dtype(value[0]) if isinstance(value, (tuple, list)) else value.dtype


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
                half = Emitter(program.graph_module, body)(aten._to_copy.default, node, dtype=torch.float16)
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
        _restore_outputs(program)
        constants.drop_unused()
        return PassResult(rewrites=rewrites)


def _is_float(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32


def _is_bool(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool
