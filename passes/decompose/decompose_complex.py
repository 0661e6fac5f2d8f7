"""Complex numbers as pairs of real ones, for back ends that have none."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sam3x.capture.program import erase_dead
from sam3x.passes.base import MatchFailure, Pass, PassResult, graph_modules, path_of
from sam3x.passes.graph.aten_nodes import NOOPS, VIEWS, aten
from sam3x.passes.graph.cond_graph import (
    Cond,
    conds_of,
    outputs,
    own_branches,
    placeholders,
    read_cond,
    results_of,
)
from sam3x.passes.graph.constants import Constants
from sam3x.passes.graph.emitter import Emitter, fake_mode_of

_SHAPED = {*VIEWS, aten.reshape.default, aten.expand.default}
_ONE_DIM = {aten.select.int, aten.slice.Tensor, aten.unsqueeze.default, aten.squeeze.dim, aten.index_select.default}


class DecomposeComplexPass(Pass):
    """Rotary embeddings written with ``view_as_complex``, a product and ``view_as_real`` become four real products.

    A complex tensor of shape (…) becomes a real one of shape (…, 2): weights, and what conditionals take and give, too.
    A graph in which one complex operator is not known keeps it. The product is written as ATen computes it, (ac − bd, ad + bc).
    """

    name = "decompose_complex"

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, failures = 0, []
        crossed = sum(_cross_in_pairs(module) for _, module in graph_modules(program))
        for prefix, module in graph_modules(program):
            unknown = [node for node in module.graph.nodes if _is_complex(node) and not _known(node)]
            unknown += [n for n in module.graph.nodes if not _is_complex(n) and _reads_complex(n) and n.target not in _EXITS]
            if unknown:
                failures += [MatchFailure(node=path_of(prefix, n), reason=f"{n.target}") for n in unknown]
                continue
            rewrites += _rewrite(program, module)
        return PassResult(rewrites=rewrites, match_failures=tuple(failures), tidied=bool(crossed))


_MADE = {aten.complex.default, aten.polar.default}
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_EXITS = {aten.view_as_real.default, aten.real.default, aten.imag.default}


def _is_complex(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.is_complex()


def _reads_complex(node: Node) -> bool:
    return any(_is_complex(item) for item in node.all_input_nodes)


def _known(node: Node) -> bool:
    if node.op == "placeholder":
        return True
    if node.target is aten.mul.Tensor:
        return any(isinstance(arg, Node) and _is_complex(arg) for arg in node.args) and not any(
            isinstance(arg, complex) for arg in node.args
        )
    if node.target in _SUMS:
        return not node.kwargs and all(isinstance(arg, Node) and _is_complex(arg) for arg in node.args)
    return node.target in _MADE or node.target in {
        aten.view_as_complex.default,
        aten.permute.default,
        *_SHAPED,
        *NOOPS,
        *_ONE_DIM,
    }


def _cross_in_pairs(module: GraphModule) -> int:
    """Let the conditionals of a graph take and give real pairs in place of complex numbers; how many did not."""
    own_branches(module)
    crossing = [read_cond(module, node) for node in conds_of(module)]
    crossing = [cond for cond in crossing if _reads_complex(cond.node) or any(map(_is_complex, outputs(cond.branches[0])))]
    for cond in crossing:
        _take_pairs(module, cond)
        if any(map(_is_complex, outputs(cond.branches[0]))):
            _give_pairs(module, cond)
    return len(crossing)


def _take_pairs(module: GraphModule, cond: Cond) -> None:
    emit = Emitter(module, cond.node)
    taken = [isinstance(item, Node) and _is_complex(item) for item in cond.operands]
    pairs = [emit(aten.view_as_real.default, item) if is_in else item for item, is_in in zip(cond.operands, taken, strict=True)]
    cond.node.update_arg(3, tuple(pairs))
    for branch in cond.branches:
        first = next(node for node in branch.graph.nodes if node.op != "placeholder")
        for node, is_in in zip(placeholders(branch), taken, strict=True):
            if is_in:
                _as_pair(branch, node, first)


def _give_pairs(module: GraphModule, cond: Cond) -> None:
    for branch in cond.branches:
        end = branch.graph.output_node()
        emit = Emitter(branch, end)
        # a copy: a branch may not return what it was given
        given = [
            emit(aten.clone.default, emit(aten.view_as_real.default, item)) if _is_complex(item) else item
            for item in outputs(branch)
        ]
        end.update_arg(0, tuple(given))
    values = (item.meta["val"] if isinstance(item, Node) else item for item in outputs(cond.branches[0]))
    cond.node.meta["val"] = tuple(values)
    for readers in results_of(cond.node).values():
        for reader in readers:
            if _is_complex(reader):
                _as_pair(module, reader, reader.next)


def _as_pair(module: GraphModule, node: Node, before: Node) -> None:
    """``node``, complex so far, is a real pair, and its readers read the complex number made of it in front of ``before``."""
    emit = Emitter(module, before)
    pair = emit(aten.view_as_real.default, node)
    value = pair.meta["val"]
    emit.undo()
    node.meta["val"] = value
    number = emit(aten.view_as_complex.default, node)
    node.replace_all_uses_with(number, delete_user_cb=lambda user: user is not number)


def _rewrite(program: ExportedProgram, module: GraphModule) -> int:
    complexes = [node for node in module.graph.nodes if _is_complex(node)]
    if not complexes:
        return 0
    constants = Constants(program, fake_mode_of(module))
    real: dict[Node, Node] = {}
    for node in complexes:
        emit = Emitter(module, node)
        if node.op == "placeholder":
            value = constants.value(node)
            if value is None:  # an input of the program stays what it is
                return 0
            real[node] = constants.add(torch.view_as_real(value.detach().resolve_conj()), node.name.removeprefix("b_"))
        else:
            real[node] = _pair(emit, node, real)
    for node in complexes:
        for user in list(node.users):
            if user.target in _EXITS:
                emit = Emitter(module, user)
                pair = real[node]
                new = pair if user.target is aten.view_as_real.default else _part(emit, pair, user.target is aten.imag.default)
                user.replace_all_uses_with(new)
    erase_dead(module)
    constants.drop_unused()
    return len(complexes)


def _part(emit: Emitter, pair: Node, index: int) -> Node:
    return emit(aten.select.int, pair, -1, int(index))


def _made(emit: Emitter, node: Node) -> Node:
    """A complex number of its parts, or of its length and angle."""
    left, right = node.args
    if node.target is aten.polar.default:
        length, angle = left, right
        left = emit(aten.mul.Tensor, length, emit(aten.cos.default, angle))
        right = emit(aten.mul.Tensor, length, emit(aten.sin.default, angle))
    shape = [*node.meta["val"].shape, 1]
    parts = (emit(aten.expand.default, emit(aten.unsqueeze.default, part, -1), emit.sizes(shape)) for part in (left, right))
    return emit(aten.cat.default, list(parts), -1)


def _scaled(emit: Emitter, node: Node, real: dict[Node, Node]) -> Node:
    """The product with a real number or tensor."""
    left, right = node.args
    number, factor = (left, right) if isinstance(left, Node) and _is_complex(left) else (right, left)
    if isinstance(factor, Node):
        factor = emit(aten.unsqueeze.default, factor, -1)
    return emit(aten.mul.Tensor, real[number], factor)


def _pair(emit: Emitter, node: Node, real: dict[Node, Node]) -> Node:
    first: Any = node.args[0]
    if node.target is aten.view_as_complex.default:
        return first
    if node.target in _MADE:
        return _made(emit, node)
    if node.target in _SUMS:
        return emit(node.target, *(real[arg] for arg in node.args))
    if node.target is aten.mul.Tensor and not all(isinstance(arg, Node) and _is_complex(arg) for arg in node.args):
        return _scaled(emit, node, real)
    rank = first.meta["val"].dim()
    pair = real[first]
    if node.target is aten.mul.Tensor:
        left, right = (tuple(_part(emit, real[arg], i) for i in (0, 1)) for arg in node.args)
        parts = [
            emit(aten.sub.Tensor, emit(aten.mul.Tensor, left[0], right[0]), emit(aten.mul.Tensor, left[1], right[1])),
            emit(aten.add.Tensor, emit(aten.mul.Tensor, left[0], right[1]), emit(aten.mul.Tensor, left[1], right[0])),
        ]
        return emit(aten.cat.default, [emit(aten.unsqueeze.default, part, -1) for part in parts], -1)
    if node.target in NOOPS:
        return pair
    if node.target in _SHAPED:
        target = aten.expand.default if node.target is aten.expand.default else aten.reshape.default
        return emit(target, pair, [*node.args[1], 2])  # type: ignore[misc]
    if node.target is aten.permute.default:
        return emit(aten.permute.default, pair, [*(dim % rank for dim in node.args[1]), rank])
    dim = node.args[1] if len(node.args) > 1 else 0
    size = rank + 1 if node.target is aten.unsqueeze.default else rank
    return emit(node.target, pair, int(dim) % size, *node.args[2:])
