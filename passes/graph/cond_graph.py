"""Read, make, inline and tidy ``torch.cond`` in exported graphs: what the branch passes share."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from sam3x.capture.program import erase_dead
from sam3x.passes.base import graph_modules, path_of
from sam3x.passes.graph.aten_nodes import HEAVY, NOOPS, SDPA, argument, aten, divided, expression
from sam3x.passes.graph.emitter import Emitter, fake_mode_of, quietly, reserve_names, size_of

COND = torch.ops.higher_order.cond
ASSERTIONS = {aten._assert_scalar.default, aten._assert_async.msg, aten._assert_async.default}
ASSERTIONS |= {aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default}


@dataclass(frozen=True, slots=True)
class Cond:
    """One conditional: ``branches`` are (true, false)."""

    node: Node
    predicate: Any
    branches: tuple[GraphModule, GraphModule]
    operands: tuple[Any, ...]


def is_cond(node: Node) -> bool:
    """Whether ``node`` is a ``torch.cond``."""
    return node.op == "call_function" and node.target is COND


def read_cond(module: GraphModule, node: Node) -> Cond:
    """The parts of a conditional of ``module``."""
    predicate, *branches, operands = node.args
    true, false = (getattr(module, branch.target) for branch in branches)
    return Cond(node=node, predicate=predicate, branches=(true, false), operands=tuple(operands))


def is_heavy(node: Node) -> bool:
    """Whether ``node`` is, or a conditional of it holds, what costs more than a conditional saves."""
    if is_cond(node):
        parts = read_cond(node.graph.owning_module, node).branches
        return any(is_heavy(inner) for part in parts for inner in part.graph.nodes)
    return node.op == "call_function" and node.target in HEAVY


def conds_of(module: GraphModule) -> list[Node]:
    """The conditionals of one graph, in order, those in branches left out."""
    return [node for node in module.graph.nodes if is_cond(node)]


def placeholders(module: GraphModule) -> list[Node]:
    """Inputs of a graph, in order."""
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def outputs(module: GraphModule) -> list[Any]:
    """What a branch returns, flat."""
    value = module.graph.output_node().args[0]
    return list(value) if isinstance(value, (tuple, list)) else [value]


def behind_copies(value: Any) -> Any:
    """The value that a branch copied only because it may not return its operand."""
    while isinstance(value, Node) and value.target in NOOPS and isinstance(value.args[0], Node):
        value = value.args[0]
    return value


def results_of(node: Node) -> dict[int, list[Node]]:
    """Position → the ``getitem`` nodes that read it."""
    found: dict[int, list[Node]] = {}
    for user in node.users:
        assert user.target is operator.getitem, f"{user} reads {node} whole"
        found.setdefault(user.args[1], []).append(user)
    return found


def attach(module: GraphModule, value: Any, hint: str = "branch") -> str:
    """Set a sub-graph or a tensor on ``module`` under a free name."""
    hint = hint.rstrip("0123456789").rstrip("_") or "branch"
    index = 0
    while hasattr(module, f"{hint}_{index}"):
        index += 1
    setattr(module, f"{hint}_{index}", value)
    return f"{hint}_{index}"


def own_branches(module: GraphModule) -> None:
    """Give every conditional of ``module`` branch graphs of its own, where two share one."""
    reserve_names(module.graph)
    seen: set[str] = set()
    for node in conds_of(module):
        for position in (1, 2):
            name = str(node.args[position].target)
            if name in seen:
                copied = copy.deepcopy(getattr(module, name))
                with module.graph.inserting_before(node):
                    node.update_arg(position, module.graph.get_attr(attach(module, copied, name)))
            seen.add(str(node.args[position].target))


def copy_node(target: GraphModule, source: GraphModule, node: Node, mapping: Mapping[Node, Any]) -> Node:
    """Copy one node at the graph's insertion point, sub-graphs and constant tensors with it."""
    new = target.graph.create_node(
        node.op,
        node.target,
        torch.fx.node.map_arg(node.args, lambda n: mapping[n]),
        torch.fx.node.map_arg(node.kwargs, lambda n: mapping[n]),
        name=node.name,
    )
    new.meta = copy.copy(node.meta)
    if node.op == "get_attr":
        value = getattr(source, str(node.target))
        if getattr(target, str(node.target), None) is not value:
            value = copy.deepcopy(value) if isinstance(value, GraphModule) else value
            new.target = attach(target, value, str(node.target))
    return new


def inline(module: GraphModule, branch: GraphModule, operands: Sequence[Any], before: Node) -> list[Any]:
    """Copy a branch's body in front of ``before``; returns what it would return."""
    reserve_names(module.graph)
    mapping: dict[Node, Any] = dict(zip(placeholders(branch), operands, strict=True))
    with module.graph.inserting_before(before):
        for node in branch.graph.nodes:
            if node.op not in ("placeholder", "output"):
                mapping[node] = copy_node(module, branch, node, mapping)
    return [mapping[value] if isinstance(value, Node) else value for value in outputs(branch)]


def replace_results(node: Node, values: Sequence[Any]) -> None:
    """Let every reader of a conditional read ``values`` instead, and erase it."""
    for position, readers in results_of(node).items():
        for reader in readers:
            reader.replace_all_uses_with(values[position])
            node.graph.erase_node(reader)
    gets = [item for item in node.args[1:3] if isinstance(item, Node)]
    node.graph.erase_node(node)
    for item in gets:
        if not item.users:
            node.graph.erase_node(item)


def _impure(node: Node) -> bool:
    """As torch says, but attention without dropout draws no random numbers."""
    if node.target is SDPA:
        return bool(argument(node, 4, "dropout_p", 0.0) != 0.0)
    return node.op in ("placeholder", "output") or bool(node.is_impure())


def sweep(module: GraphModule) -> bool:
    """Drop dead nodes, operands that neither branch reads, and sub-graphs nobody refers to, innermost first."""
    modified = erase_dead(module, _impure)
    for node in conds_of(module):
        cond = read_cond(module, node)
        for branch in cond.branches:
            modified |= sweep(branch)
        modified |= _drop_operands(cond)
    modified |= erase_dead(module, _impure)
    used = {str(node.target).partition(".")[0] for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, child in module.named_children() if isinstance(child, GraphModule)]:
        if name not in used:
            delattr(module, name)
    if modified:
        module.recompile()
    return modified


def _drop_operands(cond: Cond) -> bool:
    if cond.branches[0] is cond.branches[1]:
        return False
    true, false = (placeholders(branch) for branch in cond.branches)
    dead = [i for i in range(len(cond.operands)) if not true[i].users and not false[i].users]
    for index in dead:
        true[index].graph.erase_node(true[index])
        false[index].graph.erase_node(false[index])
    if dead:
        cond.node.update_arg(3, tuple(value for i, value in enumerate(cond.operands) if i not in dead))
        for branch in cond.branches:
            branch.recompile()
    return bool(dead)


def substitute(module: GraphModule, symbols: Mapping[sympy.Symbol, sympy.Expr]) -> None:
    """Write other sizes for ``symbols`` into the values of a graph and of its branches."""
    fake_mode = fake_mode_of(module)
    made: dict[object, torch.Tensor] = {}

    def stays(value: Any) -> bool:
        return not isinstance(value, torch.SymInt) or not value.node.expr.free_symbols & symbols.keys()

    def size(value: Any) -> Any:
        return value if stays(value) else size_of(fake_mode, divided(value.node.expr.xreplace(dict(symbols))))

    def leaf(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return size(value)
        sizes = (*value.shape, *value.stride())
        if all(stays(item) for item in sizes):
            return value
        key = (*map(expression, sizes), value.dtype, value.device)
        if key not in made:
            with quietly(fake_mode):
                made[key] = torch.empty_strided(
                    [size(item) for item in value.shape],
                    [size(item) for item in value.stride()],
                    dtype=value.dtype,
                    device=value.device,
                )
        return made[key]

    def walk(part: GraphModule) -> None:
        for node in part.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map(leaf, node.meta["val"])
            if "unbacked_bindings" in node.meta:
                kept = {s: path for s, path in node.meta["unbacked_bindings"].items() if s not in symbols}
                node.meta["unbacked_bindings"] = kept
                if not kept:
                    del node.meta["unbacked_bindings"]
            node.meta.pop("tensor_meta", None)
        for node in conds_of(part):
            for branch in read_cond(part, node).branches:
                walk(branch)

    if symbols:
        walk(module)


def views_an_input(node: Node) -> bool:
    """Whether ``node`` may share memory with an input of its graph: a chain of views leads there."""
    while node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        if schema is None or not any(result.alias_info is not None for result in schema.returns):
            return node.target is operator.getitem and isinstance(node.args[0], Node) and views_an_input(node.args[0])
        if not isinstance(node.args[0], Node):
            return True
        node = node.args[0]
    return True


def gives_a_size_alone(cond: Node) -> bool:
    """Whether nothing but sizes is read of what a conditional gives, as of the size that dac decides."""
    return all(reader.target is aten.sym_size.int for item in cond.users for reader in item.users)


def cond_places(program: ExportedProgram) -> Iterator[tuple[str, GraphModule, Node]]:
    """Every conditional of a program with the graph it stands in, innermost first."""
    for prefix, module in reversed(list(graph_modules(program))):
        for node in conds_of(module):
            yield path_of(prefix, node), module, node


Body = Callable[[GraphModule, dict[Node, Any]], Node]
"""Adds a branch's nodes to its graph, given what each operand is there; returns the result."""


def new_cond(
    module: GraphModule, before: Node, predicate: Node, operands: Sequence[Node], bodies: Sequence[Body], like: Any
) -> Node:
    """A conditional in front of ``before``; returns the node that reads its one result.

    Args:
        operands: tensors of ``module`` that the branches read.
        bodies: of the true and of the false branch.
        like: the result's value (a fake tensor).
    """
    names = []
    for body, hint in zip(bodies, ("true_graph", "false_graph"), strict=True):
        branch = GraphModule({}, Graph())
        given: dict[Node, Any] = {}
        for index, operand in enumerate(operands):
            given[operand] = branch.graph.placeholder(f"arg{index}_1")
            given[operand].meta["val"] = operand.meta["val"]
        result = body(branch, given)
        if views_an_input(result):  # a branch may not return its operand
            result = Emitter(branch, None)(aten.clone.default, result)
        branch.graph.output((result,))
        branch.recompile()
        names.append(attach(module, branch, hint))
    with module.graph.inserting_before(before):
        branches = [module.graph.get_attr(name) for name in names]
        node = module.graph.call_function(COND, (predicate, *branches, tuple(operands)))
        node.meta["val"] = (like,)
        got = module.graph.call_function(operator.getitem, (node, 0))
        got.meta["val"] = like
    return got


def copied(source: GraphModule, nodes: Sequence[Node], result: Node, renamed: Mapping[Node, Node] | None = None) -> Body:
    """A body that is a copy of ``nodes`` of ``source``; ``renamed``: a node that they read → the operand to read instead."""

    def body(branch: GraphModule, given: dict[Node, Any]) -> Node:
        mapping: dict[Node, Any] = {**given, **{old: given[new] for old, new in (renamed or {}).items()}}
        for node in nodes:
            mapping[node] = copy_node(branch, source, node, mapping)
        return mapping[result]

    return body


def inputs_of(nodes: Sequence[Node]) -> list[Node]:
    """What ``nodes`` read from outside, in order: tensors alone where ``with_sizes`` put the sizes among them."""
    inside = set(nodes)
    found: dict[Node, None] = {}
    for node in nodes:
        for item in node.all_input_nodes:
            if item not in inside:
                found[item] = None
    return list(found)


def with_sizes(nodes: Sequence[Node]) -> list[Node]:
    """``nodes`` and the sizes they need, each computed from tensors, in graph order."""
    wanted: dict[Node, None] = dict.fromkeys(nodes)
    stack = [item for node in nodes for item in node.all_input_nodes]
    while stack:
        item = stack.pop()
        if item in wanted or isinstance(item.meta.get("val"), torch.Tensor) or item.op != "call_function":
            continue
        if isinstance(item.meta.get("val"), (torch.SymInt, int)):
            wanted[item] = None
            stack.extend(item.all_input_nodes)
    order = {node: index for index, node in enumerate(nodes[0].graph.nodes)}
    return sorted(wanted, key=order.__getitem__)
