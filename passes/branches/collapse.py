"""Two nested conditionals with three branches, two of them the same, are one conditional on both predicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from sam3x.passes.graph.aten_nodes import aten
from sam3x.passes.graph.cond_graph import attach, behind_copies, is_cond, outputs, placeholders, read_cond
from sam3x.passes.graph.emitter import Emitter


def collapse(module: GraphModule, node: Node) -> bool:
    """``cond(p, cond(q, A, B), B)`` becomes ``cond(p and q, A, B)``, and its three mirror images alike."""
    cond = read_cond(module, node)
    for side, branch in enumerate(cond.branches):
        inner = _only_cond(branch)
        if inner is None:
            continue
        nested = read_cond(branch, inner)
        outside = {_outer(item): item for item in cond.operands if isinstance(item, Node)}
        terms = _terms(branch, [_outer(item) for item in cond.operands])
        given: dict[Any, Any] = {item: outside[term] for item, term in terms.items() if term in outside}
        if nested.predicate not in given or any(item not in given for item in nested.operands if isinstance(item, Node)):
            continue
        operands = [given[item] if isinstance(item, Node) else item for item in nested.operands]
        other = _returned(cond.branches[1 - side], cond.operands)
        same = [_returned(part, operands) == other for part in nested.branches]
        if not any(same):
            continue
        emit = Emitter(module, node)
        outer, within = cond.predicate, given[nested.predicate]
        taken = outer if side == 0 else emit(aten.logical_not.default, outer)  # the nested conditional is reached
        if same[1]:
            predicate = emit(aten.logical_and.default, taken, within)
        else:
            predicate = emit(aten.logical_or.default, within, emit(aten.logical_not.default, taken))
        names = [attach(module, part, name) for part, name in zip(nested.branches, ("true_graph", "false_graph"), strict=True)]
        with module.graph.inserting_before(node):
            node.args = (predicate, *(module.graph.get_attr(name) for name in names), tuple(operands))
        return True
    return False


def _only_cond(branch: GraphModule) -> Node | None:
    """The conditional whose results, in order, are what the branch returns."""
    found = None
    for index, value in enumerate(outputs(branch)):
        value = behind_copies(value)
        source = value.args[0] if isinstance(value, Node) and value.op == "call_function" and value.args else None
        if not isinstance(source, Node) or not is_cond(source) or value.args[1] != index or found not in (None, source):
            return None
        found = source
    if found is None or len(outputs(branch)) != len(found.meta["val"]):
        return None
    return found


def _returned(branch: GraphModule, operands: Sequence[Any]) -> tuple[Any, ...]:
    """What a branch returns, as terms over the operands; equal terms are equal values."""
    terms = _terms(branch, [_outer(item) for item in operands])
    return tuple(terms.get(value, value) for value in outputs(branch))


def _terms(branch: GraphModule, operands: Sequence[Any]) -> dict[Node, Any]:
    terms: dict[Node, Any] = dict(zip(placeholders(branch), operands, strict=True))
    for node in branch.graph.nodes:
        if node.op == "call_function" and not is_cond(node) and not node.is_impure():
            terms[node] = _term(node, terms)
        elif node.op not in ("placeholder", "output"):
            terms[node] = object()  # equal to nothing
    return terms


def _outer(value: Any) -> Any:
    """An operand as a term: elements picked from a tensor are the same whoever picks them."""
    if isinstance(value, Node) and value.target is aten.select.int:
        return _term(value, {item: _outer(item) for item in value.all_input_nodes})
    return value


def _term(node: Node, known: Mapping[Node, Any]) -> Any:
    def term(value: Any) -> Any:
        if isinstance(value, Node):
            return known[value]
        if isinstance(value, (list, tuple)):
            return tuple(term(item) for item in value)
        return (type(value), str(value))

    return (node.target, term(node.args), tuple((key, term(value)) for key, value in sorted(node.kwargs.items())))
