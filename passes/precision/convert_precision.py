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
from sam3x.passes.base import Pass, PassResult
from sam3x.passes.graph.aten_nodes import FILLS, NOOPS, PERMUTES, RESHAPES, SDPA, argument, aten
from sam3x.passes.graph.cond_graph import is_cond, outputs, placeholders, read_cond
from sam3x.passes.graph.emitter import Emitter, following
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
        stays: the nodes of a program that are float32, as where the back end has them in that alone.
        follows: tells of a node whether it computes in the widest dtype of what it is given, constants aside, as what moves
            numbers does; None: that alone does, and its constants count, and what is computed of sizes alone is float32.
        inputs: whether inputs of the graph are converted once, as they come in; else they count as float32 where numbers move.
        shared: whether ``fp32_ops`` are given to several graphs: a name that this one has not is then no fault of it.
    """

    name = "convert_precision"
    run_after = ("canonicalize_attention", "simplify_attention_masks")

    def __init__(
        self,
        dtype: torch.dtype,
        fp32_ops: Sequence[str] = (),
        stays: Callable[[ExportedProgram], set[Node]] = lambda _: set(),
        follows: Callable[[Node], bool] | None = None,
        *,
        inputs: bool = False,
        shared: bool = False,
    ) -> None:
        self.inputs, self.shared = inputs, shared
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
            *self.stays(program),
        }
        constants = _constants(program)
        converter = _Converter(program.graph_module, self.dtype, in_float32, self.follows)
        rewrites = converter.run(constants, _inputs(program) if self.inputs else ())
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


def _inputs(program: ExportedProgram) -> list[Node]:
    names = {item.arg.name for item in program.graph_signature.input_specs if item.kind is InputKind.USER_INPUT}
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def _constants(program: ExportedProgram) -> set[Node]:
    return {node for node in program.graph.nodes if node.op == "placeholder"} - set(_inputs(program))


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

    def run(self, constants: set[Node], inputs: Sequence[Node] = ()) -> int:
        """How many operations are in the low precision now.

        Args:
            constants: placeholders that hold weights. inputs: those that are converted as they come in.
        """
        self.constants = set(constants)
        nodes = list(self.module.graph.nodes)
        for value in inputs:
            readers = [node for node in value.users if node not in self.in_float32 and _floats(node.meta.get("val"))]
            for node in readers if _floats(value.meta["val"]) else ():
                node.replace_input_with(value, self.cast(value, self.dtype))
        for node in nodes:
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
        elif not given and node.kwargs.get("dtype") is None:  # of whole numbers, whose quotient is float32
            wanted = torch.float32
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
