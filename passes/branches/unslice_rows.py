"""Where a flag decides between all rows and some, the operators that follow skip the copies when it is all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sam3x.passes.base import Pass, PassResult, graph_modules
from sam3x.passes.graph.aten_nodes import argument, aten, expression, slice_args
from sam3x.passes.graph.cond_graph import (
    behind_copies,
    conds_of,
    copied,
    inputs_of,
    new_cond,
    outputs,
    placeholders,
    read_cond,
    results_of,
    substitute,
    sweep,
    with_sizes,
)
from sam3x.passes.graph.emitter import fake_mode_of, quietly

_N = sympy.Symbol("n")


@dataclass(frozen=True, slots=True)
class _Rows:
    """A number of rows that a conditional over one vector decides: all, or a part.

    Attributes:
        count: the ``sym_size`` that reads it.
        predicate: of the conditional. part: which of its branches takes a part, 0 the true one.
        total: the size of the vector.
        cut: the size that the part is cut at.
    """

    count: Node
    predicate: Node
    part: int
    total: Any
    cut: Any


class UnsliceRowsPass(Pass):
    """``x[:n] + y[:n]`` and ``cat(x[:n] + y, x[n:])`` become conditionals that add whole tensors where ``n`` is all rows.

    ``n`` comes out of a ``torch.cond`` that returns a vector or the head of it, as ``dac`` does. A slice of all rows is a copy
    of the tensor; the addition has to be done anyway. Equal numbers of rows (one a layer) are counted once.
    """

    name = "unslice_rows"

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites = 0
        for _, module in list(graph_modules(program)):
            rewrites += _share(module)
            for rows in _all_rows(module):
                joins = [node for node in module.graph.nodes if _joined(node, rows) is not None]
                sums = [node for node in module.graph.nodes if _sum_of_heads(node, rows)]
                for node in joins:
                    _unjoin(module, node, rows)
                for node in sums:
                    if node.users and not all(user in joins for user in node.users):
                        _unhead(module, node, rows)
                rewrites += len(joins) + len(sums)
        if rewrites:
            sweep(program.graph_module)
        return PassResult(rewrites=rewrites)


def _all_rows(module: GraphModule) -> list[_Rows]:
    found = []
    for node in conds_of(module):
        cond = read_cond(module, node)
        if len(node.meta["val"]) != 1 or not isinstance(cond.predicate, Node):
            continue
        cuts = [_cut(branch) for branch in cond.branches]
        part = next((side for side in (0, 1) if cuts[side] is not None and cuts[1 - side] is True), None)
        vector = cond.operands[0] if len(cond.operands) == 1 else None
        if part is None or cuts[part] is True or not isinstance(vector, Node):
            continue
        readers = [user for reader in results_of(node).get(0, []) for user in reader.users]
        for count in readers:
            if count.target is aten.sym_size.int:
                found.append(_Rows(count, cond.predicate, part, expression(vector.meta["val"].shape[0]), cuts[part]))
    return found


def _cut(branch: GraphModule) -> Any:
    """True where a branch returns its vector, the size it cuts it at where it returns its head, else None."""
    inputs, (result,) = placeholders(branch), outputs(branch)
    if len(inputs) != 1 or inputs[0].meta["val"].dim() != 1:
        return None
    result = behind_copies(result)
    if result is inputs[0]:
        return True
    if isinstance(result, Node) and result.target is aten.slice.Tensor:
        source, _, start, _, step = slice_args(result)
        if source is inputs[0] and start in (0, None) and step == 1:
            return expression(result.meta["val"].shape[0]).subs(expression(inputs[0].meta["val"].shape[0]), _N)
    return None


def _share(module: GraphModule) -> int:
    """Read the same number of rows from the first conditional that decides it."""
    first: dict[Any, _Rows] = {}
    symbols, gone = {}, 0
    for rows in _all_rows(module):
        key = (_predicate(rows.predicate), rows.part, rows.total, rows.cut)
        known = first.setdefault(key, rows)
        if known is rows:
            continue
        old, new = expression(rows.count.meta["val"]), expression(known.count.meta["val"])
        rows.count.replace_all_uses_with(known.count)
        if old != new:
            symbols[old] = new
        gone += 1
    substitute(module, symbols)
    if gone:
        sweep(module)
    return gone


def _predicate(node: Any) -> Any:
    """A predicate as a term, so that the same one computed twice is equal."""
    if not isinstance(node, Node) or node.target not in (
        aten.logical_and.default,
        aten.logical_or.default,
        aten.logical_not.default,
    ):
        return node
    return (node.target, *(_predicate(item) for item in node.args))


def _is_head(node: Any, rows: _Rows) -> bool:
    if not isinstance(node, Node) or node.target is not aten.slice.Tensor:
        return False
    source, dim, start, end, step = slice_args(node)
    return end is rows.count and start in (0, None) and step == 1 and _size(source, dim) == rows.total


def _size(node: Node, dim: int) -> Any:
    return expression(node.meta["val"].shape[dim])


def _sum_of_heads(node: Node, rows: _Rows) -> bool:
    """A pointwise operator over heads alone, all along one dimension; what broadcasts there may stand beside them."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    heads = [item for item in node.args if _is_head(item, rows)]
    rest = [item for item in node.args if item not in heads]
    if not heads or any(slice_args(item)[1] != slice_args(heads[0])[1] for item in heads):
        return False
    dim = slice_args(heads[0])[1] - heads[0].meta["val"].dim()
    return all(not isinstance(item, Node) or item.meta["val"].dim() < -dim or _size(item, dim) == 1 for item in rest)


def _joined(node: Node, rows: _Rows) -> tuple[Node, Node, Node] | None:
    """(x, sum, tail) of ``cat(x[:n] + y, x[n:])``."""
    if node.target is not aten.cat.default or len(node.args[0]) != 2:
        return None
    parts: Any = node.args[0]
    total, tail = parts
    if (
        not isinstance(tail, Node)
        or tail.target is not aten.slice.Tensor
        or total.target is not aten.add.Tensor
        or total.kwargs
    ):
        return None
    source, dim, start, end, step = slice_args(tail)
    heads: list[Any] = [item for item in total.args if _is_head(item, rows) and slice_args(item)[0] is source]
    whole = (isinstance(end, Node) and expression(end.meta["val"]) == rows.total) or (isinstance(end, int) and end >= 2**62)
    joined_at = argument(node, 1, "dim", 0)
    if len(heads) != 1 or start is not rows.count or step != 1 or not whole or joined_at != dim:
        return None
    return source, total, tail


def _unjoin(module: GraphModule, node: Node, rows: _Rows) -> None:
    source, total, tail = _joined(node, rows)  # type: ignore[misc]
    heads: list[Any] = [item for item in total.args if _is_head(item, rows) and slice_args(item)[0] is source]
    _choose(module, node, rows, [*heads, total, tail, node], total)


def _unhead(module: GraphModule, node: Node, rows: _Rows) -> None:
    heads = [item for item in node.args if _is_head(item, rows)]
    _choose(module, node, rows, [*dict.fromkeys(heads), node], node)  # type: ignore[list-item]


def _choose(module: GraphModule, node: Node, rows: _Rows, nodes: list[Node], total: Node) -> None:
    """Put a conditional in the place of ``node``: a copy of ``nodes``, or ``total`` with whole tensors for heads."""
    own = with_sizes(nodes)
    heads = {item: slice_args(item)[0] for item in total.args if item in nodes}
    terms = [heads.get(item, item) for item in total.args]
    operands = list(dict.fromkeys([*(item for item in terms if isinstance(item, Node)), *inputs_of(own)]))
    dim = slice_args(next(iter(heads)))[1]
    whole_value = _whole(module, node.meta["val"], dim, next(iter(heads.values())).meta["val"])

    def whole(branch: GraphModule, given: dict[Node, Any]) -> Node:
        args = tuple(given[item] if isinstance(item, Node) else item for item in terms)
        result = branch.graph.call_function(aten.add.Tensor, args)
        result.meta["val"] = whole_value  # by hand: that heads are whole here is more than their sizes say
        return result

    part = copied(module, own, node)
    bodies = (part, whole) if rows.part == 0 else (whole, part)
    made = new_cond(module, node, rows.predicate, operands, bodies, node.meta["val"])
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)


def _whole(module: GraphModule, value: torch.Tensor, dim: int, like: torch.Tensor) -> torch.Tensor:
    """``value`` with all of ``like``'s rows."""
    shape = list(value.shape)
    shape[dim - like.dim()] = like.shape[dim]
    with quietly(fake_mode_of(module)):
        return torch.empty(shape, dtype=value.dtype, device=value.device)
