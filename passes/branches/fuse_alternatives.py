"""An operator that a flag applies in one place or in the next one is applied once: pre-norm and post-norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sam3x.passes.base import MatchFailure, Pass, PassResult, graph_modules, path_of
from sam3x.passes.graph.aten_nodes import aten
from sam3x.passes.graph.cond_graph import (
    behind_copies,
    copied,
    inputs_of,
    is_cond,
    new_cond,
    outputs,
    placeholders,
    read_cond,
    results_of,
    sweep,
)
from sam3x.passes.graph.emitter import Emitter

_NORMS = {aten.layer_norm.default}


@dataclass(frozen=True, slots=True)
class _Optional:
    """``value`` is ``norm(x, …)`` where the predicate is ``when``, else ``x``.

    ``arguments`` are the norm's after ``x``, with nodes of the graph that ``value`` stands in.
    """

    value: Node
    predicate: Node
    when: bool
    x: Node
    norm: Node
    arguments: tuple[Any, ...]


class FuseAlternativesPass(Pass):
    """``t = p ? x : norm(x; a)``, ``y = p ? norm(t; b) : t`` become ``z = norm(x; p ? b : a)``, ``y = z``, ``t = p ? x : z``.

    Exactly one of the two norms runs, so one norm with the chosen weights stands for both, and no branch has to copy a
    tensor to pass it on. What else reads ``t``, as the residual addition does, goes into the branches of a conditional, where
    it reads ``x`` or ``z``; as data flow, ``t`` is picked by ``where``. Refused, with the reason: norms that differ in more
    than their weights, and weights that are not known yet where the first norm stands.
    """

    name = "fuse_alternatives"

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, failures = 0, []
        for prefix, module in list(graph_modules(program)):
            for node in list(module.graph.nodes):
                first = _optional(module, node)
                second = None if first is None else _second(module, first)
                if first is None or second is None:
                    continue
                reason = _differ(first, second)
                if reason is not None:
                    failures.append(MatchFailure(node=path_of(prefix, node), reason=reason))
                    continue
                _fuse(module, first, second)
                rewrites += 1
        if rewrites:
            sweep(program.graph_module)
        return PassResult(rewrites=rewrites, match_failures=tuple(failures))


def _behind_not(predicate: Any) -> tuple[Any, bool]:
    """The predicate without ``logical_not``, and whether their number was even."""
    even = True
    while isinstance(predicate, Node) and predicate.target is aten.logical_not.default:
        predicate, even = predicate.args[0], not even
    return predicate, even


def _optional(module: GraphModule, node: Node) -> _Optional | None:
    if node.target is aten.where.self:
        predicate, even = _behind_not(node.args[0])
        if not isinstance(predicate, Node) or predicate.meta["val"].dim():
            return None
        for side in (0, 1):
            norm, x = node.args[1 + side], node.args[2 - side]
            if isinstance(norm, Node) and norm.target in _NORMS and norm.args[0] is x and not norm.kwargs:
                return _Optional(node, predicate, (side == 0) is even, x, norm, tuple(norm.args[1:]))
        return None
    source = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(source, Node) or not is_cond(source) or len(source.meta["val"]) != 1:
        return None
    cond = read_cond(module, source)
    predicate, even = _behind_not(cond.predicate)
    if not isinstance(predicate, Node) or not isinstance(predicate.meta["val"], torch.Tensor):
        return None
    for side in (0, 1):
        norm, passed = (behind_copies(outputs(cond.branches[i])[0]) for i in (side, 1 - side))
        given, other = (dict(zip(placeholders(cond.branches[i]), cond.operands, strict=True)) for i in (side, 1 - side))
        if not isinstance(norm, Node) or norm.target not in _NORMS or other.get(passed) is None:
            continue
        x = given.get(norm.args[0])
        arguments = tuple(given.get(item, item) if isinstance(item, Node) else item for item in norm.args[1:])
        known = all(not isinstance(item, Node) or item.graph is module.graph for item in arguments)
        if isinstance(x, Node) and x is other[passed] and known and not norm.kwargs:
            return _Optional(node, predicate, (side == 0) is even, x, norm, arguments)
    return None


def _second(module: GraphModule, first: _Optional) -> _Optional | None:
    """The optional norm of what ``first`` returns, by the same predicate the other way round."""
    for user in first.value.users:
        for candidate in [user] if user.target is aten.where.self else list(user.users) if is_cond(user) else []:
            found = _optional(module, candidate)
            if found and found.x is first.value and found.predicate is first.predicate and found.when is not first.when:
                return found
    return None


def _differ(first: _Optional, second: _Optional) -> str | None:
    if first.norm.target is not second.norm.target or len(first.arguments) != len(second.arguments):
        return "the two norms are of another kind"
    place = {node: index for index, node in enumerate(first.value.graph.nodes)}
    for a, b in zip(first.arguments, second.arguments, strict=True):
        if isinstance(b, Node) and place[b] > place[first.value]:
            return "the weights of the second norm are not known where the first stands"
        if isinstance(a, Node) and isinstance(b, Node):
            left, right = a.meta["val"], b.meta["val"]
            if left.shape != right.shape or left.dtype is not right.dtype:
                return "the weights of the two norms differ in shape"
        elif isinstance(a, Node) or isinstance(b, Node) or a != b:
            return f"the two norms differ: {a} and {b}"
    return None


def _fuse(module: GraphModule, first: _Optional, second: _Optional) -> None:
    emit = Emitter(module, first.value)
    arguments = [
        emit(aten.where.self, first.predicate, *((a, b) if first.when else (b, a))) if isinstance(a, Node) and a is not b else a
        for a, b in zip(first.arguments, second.arguments, strict=True)
    ]
    z = emit(first.norm.target, first.x, *arguments)
    z.meta = {**first.value.meta, "val": z.meta["val"]}
    second.value.replace_all_uses_with(z)
    sides = (z, first.x) if first.when else (first.x, z)
    _erase(module, second.value)
    if first.value.target is aten.where.self:
        for position, value in enumerate(sides, start=1):
            first.value.update_arg(position, value)
        first.value.update_arg(0, first.predicate)
        return
    region = _readers(first.value)
    if region is None:
        passed_on = [lambda _, given, side=side: given[side] for side in sides]
        made = new_cond(module, first.value, first.predicate, [first.x, z], passed_on, first.value.meta["val"])
        first.value.replace_all_uses_with(made)
        return
    *_, last = region
    # the readers run inside, on what the branch taken passes on: a branch that only passes a tensor on copies it
    read = [item for item in inputs_of(region) if item is not first.value]
    operands = list(dict.fromkeys([first.x, z, *read]))
    bodies = [copied(module, region, last, {first.value: side}) for side in sides]
    made = new_cond(module, last, first.predicate, operands, bodies, last.meta["val"])
    last.replace_all_uses_with(made)
    module.graph.erase_node(last)


def _erase(module: GraphModule, value: Node) -> None:
    """A conditional's or ``where``'s result that nobody reads any more, with the norm that only it read."""
    inputs = value.all_input_nodes
    module.graph.erase_node(value)
    for node in inputs:
        if not node.users and (is_cond(node) or node.target in _NORMS):
            module.graph.erase_node(node)


def _readers(value: Node) -> list[Node] | None:
    """What reads ``value``, up to the one node that everything else reads it through; None where there is none such.

    Only additions, and the conditionals of ``unslice_rows``, which hold nothing but additions and slices.
    """
    readers = list(value.users)
    if len(readers) != 1:
        return None
    (reader,) = readers
    if reader.target is aten.add.Tensor:
        return [reader]
    if not is_cond(reader):
        return None
    results = results_of(reader)
    parts = [item for item in reader.args[1:3] if isinstance(item, Node)]
    if list(results) != [0] or len(results[0]) != 1 or len(reader.args[3]) != len(set(reader.args[3])):
        return None
    module = reader.graph.owning_module
    allowed = {aten.add.Tensor, aten.cat.default, aten.slice.Tensor, aten.sym_size.int}
    for branch in read_cond(module, reader).branches:
        if any(node.op == "call_function" and node.target not in allowed for node in branch.graph.nodes):
            return None
    return [*parts, reader, results[0][0]]
