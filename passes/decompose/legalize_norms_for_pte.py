"""Layer norm, group norm and the choices of a flag in operators that XNNPACK has."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sam3x.capture.program import erase_dead
from sam3x.passes.base import MatchFailure, Pass, PassResult
from sam3x.passes.graph.aten_nodes import aten, same_shape
from sam3x.passes.graph.constants import Constants
from sam3x.passes.graph.emitter import Emitter, fake_mode_of, following


class LegalizeNormsForPtePass(Pass):
    """``layer_norm``, ``native_group_norm`` → products, sums, a reciprocal root; ``where(flag, a, b)`` → arithmetic.

    XNNPACK has none of these, and each would cut its graph in two. The mean is a product with a row of 1/n. A norm that a
    flag switches (``where(flag, norm(x), x)``) costs nothing more than the norm: the flag acts on the small tensors, mean,
    reciprocal root, weight and bias, and with 0 they leave ``x`` as it is to the bit. As long as values are finite, the result
    is that of ``where``. ExecuTorch's own group norm takes E[x²] − E[x]², each summed in one float32: of the 2.65 million
    elements of a group of SAM3's mask head two digits are left. Here the mean is one of means, dimension by dimension.
    """

    name = "legalize_norms_for_pte"
    run_after = ("fold_constants",)

    def call(self, program: ExportedProgram) -> PassResult:
        module = program.graph_module
        work = _Rewrite(module, Constants(program, fake_mode_of(module)))
        failures: list[MatchFailure] = []
        rewrites = 0
        for node in list(module.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is aten.layer_norm.default:
                width = node.meta["val"].shape[-1]
                if list(node.args[1]) != [width] or node.meta["val"].dtype is not torch.float32:
                    failures.append(MatchFailure(node=node.name, reason="not a float32 norm over the last dimension alone"))
                    continue
                work.norm(node)
                rewrites += 1
            elif node.target is aten.native_group_norm.default:
                reason = work.group_norm(node)
                failures += [] if reason is None else [MatchFailure(node=node.name, reason=reason)]
                rewrites += reason is None
            elif node.target is aten.where.self and node.users and _is_flag(node):
                work.select(node)
                rewrites += 1
        erase_dead(module)
        work.constants.drop_unused()
        return PassResult(rewrites=rewrites, match_failures=tuple(failures))


def _is_flag(node: Node) -> bool:
    """Both values are whole tensors, the condition is one for many elements: a flag, or one for each row."""
    condition, a, b = (item.meta["val"] if isinstance(item, Node) else None for item in node.args)
    if a is None or b is None or condition is None or a.dtype is not torch.float32 or b.dtype is not torch.float32:
        return False
    shape = node.meta["val"].shape
    if not shape or not all(same_shape(value.shape, shape) for value in (a, b)):
        return False
    return condition.dim() == 0 or statically_known_true(condition.shape[-1] == 1)


class _Rewrite:
    def __init__(self, module: GraphModule, constants: Constants) -> None:
        self.module, self.constants = module, constants
        self._flags: dict[tuple[Node, bool], Node] = {}

    def flag(self, condition: Node, negated: bool) -> Node:
        """The condition as 0.0 or 1.0, of rank 1 or more."""
        while condition.target is aten.logical_not.default:
            condition, negated = condition.args[0], not negated  # type: ignore[assignment]
        if (condition, negated) not in self._flags:
            early = Emitter(self.module, following(condition))
            value = early(aten.logical_not.default, condition) if negated else condition
            if value.meta["val"].dim() == 0:
                value = early(aten.reshape.default, value, [1])
            self._flags[condition, negated] = early(aten._to_copy.default, value, dtype=torch.float32)
        return self._flags[condition, negated]

    def norm(self, node: Node) -> None:
        x, _, weight, bias, eps = (*node.args, None, None, 1e-5)[:5] if len(node.args) < 5 else node.args[:5]
        choice = next(iter(node.users)) if len(node.users) == 1 else None
        on: Node | None = None
        off: Node | None = None
        emit = Emitter(self.module, node)
        if choice is not None and choice.target is aten.where.self and _is_flag(choice) and set(choice.args[1:]) == {node, x}:
            kept = choice.args[2] is node
            on, off = (self.flag(choice.args[0], kept ^ value) for value in (False, True))
            emit = Emitter(self.module, choice)
        width = int(node.meta["val"].shape[-1])
        row = self.constants.add(torch.full((1, width), 1.0 / width), "mean_row")
        mean = emit(aten.linear.default, x, row)
        if on is not None:
            mean = emit(aten.mul.Tensor, mean, on)
        centred = emit(aten.sub.Tensor, x, mean)
        square = emit(aten.mul.Tensor, centred, centred)
        variance = emit(aten.linear.default, square, row, self.constants.add(torch.full((1,), float(eps)), "norm_eps"))
        root = emit(aten.rsqrt.default, variance)
        if on is not None:
            root = emit(aten.add.Tensor, emit(aten.mul.Tensor, root, on), off)
        result = emit(aten.mul.Tensor, centred, root)
        if weight is not None:
            factor = weight if on is None else emit(aten.add.Tensor, emit(aten.mul.Tensor, weight, on), off)
            result = emit(aten.mul.Tensor, result, factor)
        if bias is not None:
            result = emit(aten.add.Tensor, result, bias if on is None else emit(aten.mul.Tensor, bias, on))
        (node if on is None else choice).replace_all_uses_with(result)
        if on is not None:
            choice.args = (choice.args[0], x, x)

    def group_norm(self, node: Node) -> str | None:
        """(N, C, …) → the same; why not, where it stays."""
        x, weight, bias, _, channels, _, groups, eps = node.args
        value = x.meta["val"]
        if value.dtype is not torch.float32 or not all(isinstance(size, int) for size in value.shape[1:]):
            return "not float32, or of a size that only a run tells"
        if any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in node.users):
            return "its mean or its deviation is read"
        emit = Emitter(self.module, node)
        batch = int(value.shape[0]) if isinstance(value.shape[0], int) else -1
        inner = [int(channels) // int(groups), *map(int, value.shape[2:])]
        parts = emit(aten.reshape.default, x, [batch, groups, *inner])
        ones = [1] * len(inner)

        def mean(of: Node, extra: float = 0.0) -> Node:
            for index in reversed(range(len(inner))):
                row = self.constants.add(torch.full((1, inner[index]), 1.0 / inner[index]), "mean_row")
                more = [self.constants.add(torch.full((1,), extra), "norm_eps")] if extra and not index else []
                shape = [batch, groups, *(inner[:index] or ones)]
                of = emit(aten.reshape.default, emit(aten.linear.default, of, row, *more), shape)
            return of

        centred = emit(aten.sub.Tensor, parts, mean(parts))
        root = emit(aten.rsqrt.default, mean(emit(aten.mul.Tensor, centred, centred), float(eps)))
        result = emit(aten.reshape.default, emit(aten.mul.Tensor, centred, root), [batch, channels, *inner[1:]])
        for operator_, own in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
            if own is not None:
                held, shape = self.constants.value(own), [int(channels), *ones[1:]]
                factor = emit(aten.reshape.default, own, shape) if held is None else None
                result = emit(operator_, result, factor or self.constants.add(held.reshape(shape), "norm"))
        for user in list(node.users):
            user.replace_all_uses_with(result)
        return None

    def select(self, node: Node) -> None:
        condition, a, b = node.args
        emit = Emitter(self.module, node)
        for sum_, other, negated in ((a, b, False), (b, a, True)):
            if isinstance(sum_, Node) and sum_.target is aten.add.Tensor and other in sum_.args and not sum_.kwargs:
                step = sum_.args[1] if sum_.args[0] is other else sum_.args[0]  # where(f, x + step, x) = x + f·step
                part = emit(aten.mul.Tensor, step, self.flag(condition, negated))
                result = emit(aten.add.Tensor, other, part)
                break
        else:
            parts: list[Any] = [
                emit(aten.mul.Tensor, value, self.flag(condition, negated)) for value, negated in ((a, False), (b, True))
            ]
            result = emit(aten.add.Tensor, *parts)
        node.replace_all_uses_with(result)
