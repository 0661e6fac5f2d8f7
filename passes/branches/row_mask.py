"""A conditional number of rows as a mask: everything runs at full size, and each row keeps what it would have had.

The rows of a tensor are found by following one dimension through the graph, or two of a mask of pairs (``row_places``). In an
attention among the chosen rows a mask hides the others; what those become is dropped where the rows are joined again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch.fx import GraphModule, Node

from sam3x.passes.base import NoMatchError
from sam3x.passes.branches.row_places import (
    SOFTMAX,
    Place,
    Places,
    fits,
    is_placed,
    places_after,
    shape_of,
)
from sam3x.passes.graph.aten_nodes import NOOPS, SDPA, argument, aten, expression, slice_args
from sam3x.passes.graph.cond_graph import (
    ASSERTIONS,
    Cond,
    inline,
    outputs,
    own_branches,
    placeholders,
    replace_results,
    results_of,
    substitute,
)
from sam3x.passes.graph.emitter import Emitter, put


@dataclass(frozen=True, slots=True)
class _Rest:
    """The rows of ``whole`` after the chosen ones."""

    whole: Node
    dim: int


def mask_rows(module: GraphModule, cond: Cond) -> None:
    """Replace ``cond`` by a mask of rows.

    Raises:
        NoMatchError: nothing was changed.
    """
    choice = _Choice(module, cond)
    choice.prove()
    choice.apply()


class _Choice:
    def __init__(self, module: GraphModule, cond: Cond) -> None:
        self.module, self.cond, self.node = module, cond, cond.node
        bindings = self.node.meta["unbacked_bindings"]
        if len(bindings) != 1:
            raise NoMatchError("the branches' results differ in more than one size")
        (self.symbol,) = bindings
        self.all_rows = False  # whether one of the branches takes every row
        self.prefixes = self._prefixes()
        self.size = self._full_size()
        self.rows: dict[Node, Places | _Rest] = {}
        self.closings: list[Node] = []
        self.doubtful: set[Node] = set()  # where rows that are not chosen may be no finite numbers
        self.over_keys: list[Node] = []  # attention whose keys are the chosen rows too
        self.heads: list[Node] = []
        self.checks: list[Node] = []

    def _prefixes(self) -> dict[int, tuple[int, int]]:
        """Result → (operand, dimension) of which both branches return the first rows."""
        found = {}
        branches = [(outputs(branch), placeholders(branch)) for branch in self.cond.branches]
        for index in range(len(branches[0][0])):
            sources = []
            for returned, inputs in branches:
                dims = [d for d, size in enumerate(shape_of(self.node.meta["val"][index])) if self.symbol in size.free_symbols]
                if len(dims) != 1:
                    raise NoMatchError("a result of the conditional is no choice of rows")
                source, length = _prefix(returned[index], dims[0], inputs)
                self.all_rows |= length is None
                sources.append((inputs.index(source), dims[0], length))
            if sources[0][:2] != sources[1][:2]:
                raise NoMatchError("the branches take rows of different tensors")
            found[index] = sources[0][:2]
        return found

    def _full_size(self) -> sympy.Expr:
        sizes = {shape_of(self.cond.operands[operand].meta["val"])[dim] for operand, dim in self.prefixes.values()}
        if len(sizes) != 1:
            raise NoMatchError("the tensors whose rows are chosen differ in size")
        return sizes.pop()

    # --- the proof

    def prove(self) -> None:
        for index, readers in results_of(self.node).items():
            for reader in readers:
                self.rows[reader] = (Place(self.prefixes[index][1]),)
        known = set(self.rows)
        for node in self.module.graph.nodes:
            if node is self.node or node in known or not any(self._concerned(item) for item in node.all_input_nodes):
                continue
            self._step(node)

    def _concerned(self, node: Node) -> bool:
        return node in self.rows or (isinstance(node.meta.get("val"), torch.SymInt) and self._has(node.meta["val"]))

    def _has(self, value: Any) -> bool:
        return self.symbol in expression(value).free_symbols

    def _step(self, node: Node) -> None:
        value = node.meta.get("val")
        if node.target in ASSERTIONS or isinstance(value, torch.SymBool):
            self.checks.append(node)  # what tracing assumed of the number of rows
            return
        if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
            return  # a size: judged where a tensor is made with it
        if node.op == "output":
            raise NoMatchError("the chosen rows leave the graph")
        if node.target is aten.slice.Tensor and self._slice(node):
            return
        if node.target is aten.cat.default and self._closes(node):
            self.closings.append(node)
            return
        self._follow(node)

    def _follow(self, node: Node) -> None:
        """Find the rows of the result; raises where they mix."""
        inside: dict[Node, Places] = {}
        for item in node.all_input_nodes:
            rows = self.rows.get(item)
            if isinstance(rows, _Rest):
                raise NoMatchError(f"the rest of the rows is used by {node.target}")
            if rows is not None:
                inside[item] = rows
        if node.target in SOFTMAX or not self.doubtful.isdisjoint(inside):
            self.doubtful.add(node)  # a row may be -inf throughout
        places = self._attention(node, inside) if node.target is SDPA else places_after(node, inside, self.symbol)
        if not is_placed(node.meta["val"], places, self.symbol):
            raise NoMatchError(f"'{node.name}' has a size that is no number of rows")
        self.rows[node] = places

    def _slice(self, node: Node) -> bool:
        """A slice up to, or from, the number of rows."""
        source, dim, start, end, step = slice_args(node)
        dim %= source.meta["val"].dim()
        bounds = [bound is not None and self.symbol in _value(bound).free_symbols for bound in (start, end)]
        if not any(bounds):
            return False
        own = self.rows.get(source, ())
        if isinstance(own, _Rest) or step != 1 or any(place.dim == dim for place in own):
            raise NoMatchError(f"'{node.name}' takes rows of rows")
        whole = expression(source.meta["val"].shape[dim]) == self.size
        # where a branch takes every row, a tensor of which that many rows are taken has them
        enough = whole or (self.all_rows and shape_of(node.meta["val"])[dim] == self.symbol)
        if enough and bounds[1] and _value(start) in (0, None) and _value(end) == self.symbol:
            self.rows[node] = tuple(sorted((*own, Place(dim)), key=lambda place: place.dim))
            self.heads.append(node)
            return True
        to_the_end = end is None or _value(end) == 2**63 - 1 or _value(end) == self.size
        if whole and not own and bounds[0] and not bounds[1] and to_the_end and _value(start) == self.symbol:
            self.rows[node] = _Rest(source, dim)
            return True
        raise NoMatchError(f"'{node.name}' slices by the number of rows, and is neither its head nor its rest")

    def _closes(self, node: Node) -> bool:
        """``cat([rows, rest])``: the chosen rows, changed, and the others as they were."""
        parts: Any = node.args[0]
        dim: Any = argument(node, 1, "dim", 0)
        if len(parts) != 2 or not isinstance(self.rows.get(parts[1]), _Rest):
            return False
        dim %= node.meta["val"].dim()
        head, rest = self.rows.get(parts[0]), self.rows[parts[1]]
        if head != (Place(dim),) or rest.dim != dim:
            raise NoMatchError("rows and rest are joined along another dimension")
        return True

    def _attention(self, node: Node, inside: dict[Node, Places]) -> Places:
        """Images stay apart, and so do queries; among the chosen rows, at full size, the others' keys are hidden."""
        refused = NoMatchError(f"{node.target} ('{node.name}') may mix the chosen rows with the others")
        query, key, value = node.args[:3]
        mask: Any = argument(node, 3, "attn_mask")
        rank = query.meta["val"].dim()
        given = [*node.args[4:], *(node.kwargs.get(name) for name in ("attn_mask", "dropout_p", "is_causal"))]
        if any(given) or any(item.meta["val"].dim() != rank for item in (key, value)):
            raise refused
        own, keys, values = (inside.get(item, ()) for item in (query, key, value))
        batch = tuple(place for place in own if place.dim < rank - 2)
        among = (*batch, Place(rank - 2))
        if own == keys == values == among:
            if key in self.doubtful or value in self.doubtful:
                raise NoMatchError(f"keys or values of '{node.name}' may be no finite numbers where rows are not chosen")
            places = (*among, Place(rank - 1))
            self.over_keys.append(node)
        elif keys == values == batch and all(place.dim != rank - 1 for place in own):
            places = own
        else:
            raise refused
        if mask is not None:
            if not fits(mask, inside.get(mask, ()), places, rank):
                raise refused
            last = mask.meta["val"].dim() - 1
            if any(place.dim != last for place in inside.get(mask, ())):
                self.doubtful.add(node)  # a row that is not chosen may see no key where all of the chosen see one
        return own

    # --- the rewrite

    def apply(self) -> None:
        module, node = self.module, self.node
        own_branches(module)
        results = [inline(module, branch, self.cond.operands, node) for branch in self.cond.branches]
        emit = Emitter(module, node)
        operand, dim = self.prefixes[0]
        source = self.cond.operands[operand]
        size: Any = int(self.size) if self.size.is_Integer else emit(aten.sym_size.int, source, dim)
        lengths = [_prefix(result[0], dim, self.cond.operands)[1] for result in results]
        mask = _chosen_rows(emit, self.cond.predicate, source, size, lengths)
        for check in reversed(self.checks):
            if not check.users:
                module.graph.erase_node(check)
        for readers in results_of(node).values():
            for reader in readers:
                for user in list(reader.users):
                    if user.target is aten.sym_size.int and self._has(user.meta["val"]):
                        put(user, size)
        replace_results(node, [self.cond.operands[self.prefixes[i][0]] for i in range(len(self.prefixes))])
        for head in self.heads:
            head_source, head_dim, *_ = slice_args(head)
            if expression(head_source.meta["val"].shape[head_dim]) == self.size:
                put(head, head_source)
            elif size not in head.all_input_nodes and not isinstance(size, Node):
                head.args = (head_source, head_dim, 0, size)
        substitute(module, {self.symbol: self.size})
        for attention in self.over_keys:
            _hide_keys(module, attention, mask, size)
        for closing in self.closings:
            rest: Any = self.rows[closing.args[0][1]]
            _join(module, closing, rest.whole, rest.dim, mask, size)


def _value(bound: Any) -> Any:
    """A slice's bound as an expression: comparing symbolic sizes themselves would add guards."""
    return None if bound is None else expression(bound.meta["val"] if isinstance(bound, Node) else bound)


def _prefix(node: Any, dim: int, ends: Sequence[Any]) -> tuple[Any, Any]:
    """(tensor, how many of its first rows along ``dim``; None for all): what ``node`` is, copies aside."""
    length = None
    while node not in ends:
        if not isinstance(node, Node) or node.op != "call_function":
            raise NoMatchError("the branches do more than take the first rows of an operand")
        if node.target in NOOPS:
            node = node.args[0]
            continue
        if node.target is not aten.slice.Tensor or length is not None:
            raise NoMatchError("the branches do more than take the first rows of an operand")
        source, at, start, end, step = slice_args(node)
        if at % source.meta["val"].dim() != dim or _value(start) not in (0, None) or step != 1 or end is None:
            raise NoMatchError("a branch takes other rows than the first")
        node, length = source, end
    return node, length


def _chosen_rows(emit: Emitter, predicate: Any, source: Node, size: Any, lengths: Sequence[Any]) -> Node:
    """(rows,) bool: whether a row is one of the chosen; ``lengths``: how many each branch takes, None for all."""
    if predicate.meta["val"].dim():
        predicate = emit(aten.reshape.default, predicate, [])
    device = source.meta["val"].device
    index = emit(aten.arange.start_step, 0, size, 1, dtype=torch.int64, device=device, pin_memory=False)
    true, false = (None if length is None else emit(aten.lt.Scalar, index, length) for length in lengths)
    if true is not None and false is not None:
        return emit(aten.where.self, predicate, true, false)
    if true is not None:
        return emit(aten.logical_or.default, true, emit(aten.logical_not.default, predicate))
    if false is not None:
        return emit(aten.logical_or.default, false, predicate)
    return emit(aten.ge.Scalar, index, 0)


def _hide_keys(module: GraphModule, attention: Node, chosen: Node, size: Any) -> None:
    """Only chosen rows may be attended; ``size`` is how many there are in all."""
    emit = Emitter(module, attention)
    rank = attention.meta["val"].dim()
    mask: Any = emit(aten.reshape.default, chosen, [1] * (rank - 1) + [size])
    given: Any = argument(attention, 3, "attn_mask")
    if given is not None and given.meta["val"].dtype is torch.bool:
        mask = emit(aten.logical_and.default, given, mask)
    elif given is not None:
        mask = emit(aten.where.self, mask, given, emit.number(-math.inf, given))
    attention.args = (*attention.args[:3], mask, *attention.args[4:])


def _join(module: GraphModule, closing: Node, whole: Node, dim: int, chosen: Node, size: Any) -> None:
    """``cat([rows, rest])`` picks each row: the chosen from ``rows``, the others from ``whole``, of which they are the rest."""
    head, rest = cast(list[Node], closing.args[0])
    emit = Emitter(module, closing)
    rank = closing.meta["val"].dim()
    view = emit(aten.reshape.default, chosen, [size if d == dim else 1 for d in range(rank)])
    picked = emit(aten.where.self, view, head, whole)
    put(closing, picked)
    if not rest.users:
        rest.graph.erase_node(rest)
