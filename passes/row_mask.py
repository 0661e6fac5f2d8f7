"""A conditional number of rows as a mask: everything runs at full size, and each row keeps what it would have had.

The rows of a tensor are found by following one dimension through the graph. ``Rows(dim, left, right)`` says that dimension
``dim`` of a tensor counts left × rows × right, so that merging and splitting dimensions keeps track of them.
In an attention among the chosen rows a mask hides the others.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sam3x.passes.cond_graph import (
    ASSERTIONS,
    Builder,
    Cond,
    aten,
    expression,
    fake_mode_of,
    inline,
    outputs,
    own_branches,
    placeholders,
    replace_results,
    results_of,
    slice_args,
    substitute,
)
from sam3x.passes.row_mask_emit import chosen_rows, hide_keys, join, swap

_COPIES = {aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default}
_RESHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default}
_RESHAPES |= {aten.squeeze.dims, aten.squeeze.dim}
_ALONG = {aten.slice.Tensor, aten.select.int, aten.split_with_sizes.default, aten.split.Tensor, aten._softmax.default}
_ALONG |= {aten.softmax.int, aten._log_softmax.default, aten.cumsum.default, aten.unbind.int}
_REDUCTIONS = {aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default}
_PRODUCTS = {aten.matmul.default, aten.bmm.default}
_SDPA = aten.scaled_dot_product_attention.default


class NotRowsError(Exception):
    """The conditional is no choice of rows, or rows mix; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Where a tensor's rows are: its dimension ``dim`` counts left × rows × right."""

    dim: int
    left: sympy.Expr
    right: sympy.Expr


@dataclass(frozen=True, slots=True)
class _Rest:
    """The rows of ``whole`` after the chosen ones."""

    whole: Node
    dim: int


def mask_rows(program: ExportedProgram | None, module: GraphModule, cond: Cond) -> None:
    """Replace ``cond`` by a mask of rows.

    Raises:
        NotRowsError: nothing was changed.
    """
    choice = _Choice(module, cond)
    choice.prove()
    choice.apply(program)


def _shape(node: Node) -> list[sympy.Expr]:
    return [expression(size) for size in node.meta["val"].shape]


class _Choice:
    def __init__(self, module: GraphModule, cond: Cond) -> None:
        self.module, self.cond, self.node = module, cond, cond.node
        bindings = self.node.meta["unbacked_bindings"]
        if len(bindings) != 1:
            raise NotRowsError("the branches' results differ in more than one size")
        (self.symbol,) = bindings
        self.all_rows = False  # whether one of the branches takes every row
        self.prefixes = self._prefixes()
        self.size = self._full_size()
        self.rows: dict[Node, Rows | _Rest] = {}
        self.closings: list[Node] = []
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
                dims = [d for d, size in enumerate(_shape_of(self.node.meta["val"][index])) if self.symbol in size.free_symbols]
                if len(dims) != 1:
                    raise NotRowsError("a result of the conditional is no choice of rows")
                source, length = _prefix(returned[index], dims[0], inputs)
                self.all_rows |= length is None
                sources.append((inputs.index(source), dims[0], length))
            if sources[0][:2] != sources[1][:2]:
                raise NotRowsError("the branches take rows of different tensors")
            found[index] = sources[0][:2]
        return found

    def _full_size(self) -> sympy.Expr:
        sizes = {_shape(self.cond.operands[operand])[dim] for operand, dim in self.prefixes.values()}
        if len(sizes) != 1:
            raise NotRowsError("the tensors whose rows are chosen differ in size")
        return sizes.pop()

    # --- the proof

    def prove(self) -> None:
        for index, readers in results_of(self.node).items():
            for reader in readers:
                self.rows[reader] = Rows(self.prefixes[index][1], sympy.S.One, sympy.S.One)
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
            raise NotRowsError("the chosen rows leave the graph")
        if node.target is aten.slice.Tensor and self._slice(node):
            return
        if node.target is aten.cat.default and self._closes(node):
            self.closings.append(node)
            return
        for item in node.all_input_nodes:
            if isinstance(self.rows.get(item), _Rest):
                raise NotRowsError(f"the rest of the rows is used by {node.target}")
        self.rows[node] = self._through(node)

    def _slice(self, node: Node) -> bool:
        """A slice up to, or from, the number of rows."""
        source, dim, start, end, step = slice_args(node)
        dim %= source.meta["val"].dim()
        bounds = [bound is not None and self.symbol in _value(bound).free_symbols for bound in (start, end)]
        if not any(bounds):
            return False
        plain = source not in self.rows and step == 1
        whole = plain and expression(source.meta["val"].shape[dim]) == self.size
        # where a branch takes every row, a tensor of which that many rows are taken has them
        enough = whole or (plain and self.all_rows and _shape(node)[dim] == self.symbol)
        if enough and bounds[1] and _value(start) in (0, None) and _value(end) == self.symbol:
            self.rows[node] = Rows(dim, sympy.S.One, sympy.S.One)
            self.heads.append(node)
            return True
        to_the_end = end is None or _value(end) == 2**63 - 1 or _value(end) == self.size
        if whole and bounds[0] and not bounds[1] and to_the_end and _value(start) == self.symbol:
            self.rows[node] = _Rest(source, dim)
            return True
        raise NotRowsError(f"'{node.name}' slices by the number of rows, and is neither its head nor its rest")

    def _closes(self, node: Node) -> bool:
        """``cat([rows, rest])``: the chosen rows, changed, and the others as they were."""
        parts: Any = node.args[0]
        dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if len(parts) != 2 or not isinstance(self.rows.get(parts[1]), _Rest):
            return False
        dim %= node.meta["val"].dim()
        head, rest = self.rows.get(parts[0]), self.rows[parts[1]]
        if head != Rows(dim, sympy.S.One, sympy.S.One) or rest.dim != dim:  # type: ignore[union-attr]
            raise NotRowsError("rows and rest are joined along another dimension")
        return True

    def _through(self, node: Node) -> Rows:
        """Where the rows of the result are; raises where they mix."""
        target: Any = node.target
        inside = {item: rows for item, rows in self.rows.items() if item in node.all_input_nodes}
        if target is operator.getitem:
            return inside[node.args[0]]  # type: ignore[index, return-value]
        source: Any = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        rows: Any = inside.get(source)
        only = rows is not None and len(inside) == 1
        refused = NotRowsError(f"{target} ('{node.name}') may mix the chosen rows with the others")
        if target in (aten.full.default, aten.zeros.default, aten.ones.default):
            return self._made(node)
        if target in _RESHAPES and only:
            return self._reshaped(node, _shape(source), rows)
        if target is aten.permute.default and only:
            dims = [d % len(node.args[1]) for d in node.args[1]]  # type: ignore[arg-type, union-attr, operator]
            return Rows(dims.index(rows.dim), rows.left, rows.right)
        if target is aten.transpose.int and only:
            rank = source.meta["val"].dim()
            a, b = (d % rank for d in node.args[1:3])  # type: ignore[operator]
            return Rows({a: b, b: a}.get(rows.dim, rows.dim), rows.left, rows.right)
        if target is aten.linear.default and only and rows.dim != source.meta["val"].dim() - 1:
            return rows
        if target is aten.layer_norm.default and only and rows.dim < source.meta["val"].dim() - len(node.args[1]):  # type: ignore[arg-type]
            return rows
        if target in _ALONG and only:
            given = (
                node.args[2] if target in (aten.split_with_sizes.default, aten.split.Tensor) and len(node.args) > 2 else None
            )
            plain = node.args[1] if len(node.args) > 1 and given is None and "split" not in str(target) else given
            dim = (plain if isinstance(plain, int) else 0) % source.meta["val"].dim()
            if dim != rows.dim:
                return Rows(rows.dim - (target is aten.select.int and dim < rows.dim), rows.left, rows.right)
        if target in _REDUCTIONS and only and len(node.args) > 1 and isinstance(node.args[1], (list, tuple)) and node.args[1]:
            rank = source.meta["val"].dim()
            dims = [d % rank for d in node.args[1]]  # type: ignore[operator]
            kept = node.args[2] if len(node.args) > 2 else False
            if rows.dim not in dims:
                return Rows(rows.dim - (0 if kept else sum(d < rows.dim for d in dims)), rows.left, rows.right)
        if target is aten.expand.default and only:
            return self._aligned(node, inside)
        if target in _PRODUCTS or target is _SDPA:
            return self._product(node, inside, refused)
        if target is aten.where.self or target in _COPIES or torch.Tag.pointwise in getattr(target, "tags", ()):
            return self._aligned(node, inside)
        if target in (aten.full_like.default, aten.zeros_like.default, aten.ones_like.default, aten._to_copy.default):
            return self._aligned(node, inside)
        raise refused

    def _made(self, node: Node) -> Rows:
        dims = [d for d, size in enumerate(_shape(node)) if self.symbol in size.free_symbols]
        if len(dims) != 1 or _shape(node)[dims[0]] != self.symbol:
            raise NotRowsError(f"'{node.name}' is made with a size that is no number of rows")
        return Rows(dims[0], sympy.S.One, sympy.S.One)

    def _reshaped(self, node: Node, shape: list[sympy.Expr], rows: Rows) -> Rows:
        """Elements keep their order, so rows stay where as many elements stand before and within them."""
        before, after = math.prod(shape[: rows.dim]) * rows.left, rows.right * math.prod(shape[rows.dim + 1 :])
        new = _shape(node)
        dims = [d for d, size in enumerate(new) if self.symbol in size.free_symbols]
        if len(dims) == 1:
            left = sympy.cancel(before / math.prod(new[: dims[0]]))
            right = sympy.cancel(after / math.prod(new[dims[0] + 1 :]))
            whole = all(sympy.denom(side) == 1 for side in (left, right))
            if whole and sympy.expand(left * self.symbol * right - new[dims[0]]) == 0:
                return Rows(dims[0], left, right)
        raise NotRowsError(f"'{node.name}' reshapes {shape} to {new}, which cuts across rows")

    def _aligned(self, node: Node, inside: dict[Node, Any]) -> Rows:
        """Broadcasting: all rows at the same place counted from the last dimension."""
        rank = node.meta["val"].dim()
        places = {(rank - item.meta["val"].dim() + rows.dim, rows.left, rows.right) for item, rows in inside.items()}
        shape = _shape(node)
        dims = [d for d, size in enumerate(shape) if self.symbol in size.free_symbols]
        if len(places) != 1 or dims != [next(iter(places))[0]]:
            raise NotRowsError(f"{node.target} ('{node.name}') combines rows at different places")
        (place,) = places
        for item in node.all_input_nodes:
            value = item.meta["val"]
            if isinstance(value, torch.Tensor) and item not in inside:
                at = place[0] - (rank - value.dim())
                if at >= 0 and not statically_known_true(value.shape[at] == 1):
                    raise NotRowsError(f"{node.target} ('{node.name}') meets '{item.name}', whose rows are not known")
        return Rows(*place)

    def _product(self, node: Node, inside: dict[Node, Any], refused: NotRowsError) -> Rows:
        """Batch dimensions stay apart; so do the rows of the left factor, or the queries, when the other side has none."""
        q: Any = node.args[0]
        rank = q.meta["val"].dim()
        if node.target is _SDPA and (any(node.args[4:]) or node.kwargs.get("dropout_p") or node.kwargs.get("is_causal")):
            raise refused
        others = [item for item in node.args[1:] if isinstance(item, Node)]
        plain = node.target is aten.matmul.default and others[0] not in inside and others[0].meta["val"].dim() == 2 < rank
        if plain and inside[q].dim != rank - 1:
            return inside[q]  # as a linear layer
        if q not in inside or any(item.meta["val"].dim() != rank for item in others[: 2 if node.target is _SDPA else 1]):
            raise refused
        rows = inside[q]
        factors, masks = (others[:2], others[2:]) if node.target is _SDPA else (others[:1], [])
        if rows.dim < rank - 2:
            if any(inside.get(item) != rows for item in factors):
                raise refused
        elif node.target is _SDPA and rows == Rows(rank - 2, sympy.S.One, sympy.S.One) == inside.get(factors[0]):
            return self._over_keys(node, inside, rows, masks, refused)
        elif rows.dim == rank - 1 or any(item in inside for item in factors):
            raise refused
        for mask in masks:
            at = rows.dim - (rank - mask.meta["val"].dim())
            if mask in inside and inside[mask] != Rows(at, rows.left, rows.right):
                raise refused
            if mask not in inside and at >= 0 and not statically_known_true(mask.meta["val"].shape[at] == 1):
                raise refused
        return rows

    def _over_keys(self, node: Node, inside: dict[Node, Any], rows: Rows, masks: list[Node], refused: NotRowsError) -> Rows:
        """Attention among the chosen rows: at full size the others' keys are hidden; a mask over the keys is one of rows."""
        if inside.get(node.args[2]) != rows or node.kwargs.get("attn_mask") is not None:  # type: ignore[arg-type]
            raise refused
        for mask in masks:
            sizes = mask.meta["val"].shape
            of_keys = inside.get(mask) == Rows(len(sizes) - 1, sympy.S.One, sympy.S.One)
            if not of_keys or (len(sizes) > 1 and not statically_known_true(sizes[-2] == 1)):
                raise refused
        self.over_keys.append(node)
        return rows

    # --- the rewrite

    def apply(self, program: ExportedProgram | None) -> None:
        module, node = self.module, self.node
        own_branches(module)
        results = [inline(module, branch, self.cond.operands, node) for branch in self.cond.branches]
        emit = Builder(module.graph, node, fake_mode_of(module))
        operand, dim = self.prefixes[0]
        source = self.cond.operands[operand]
        size: Any = int(self.size) if self.size.is_Integer else emit(aten.sym_size.int, source, dim)
        lengths = [_prefix(result[0], dim, self.cond.operands)[1] for result in results]
        mask = chosen_rows(emit, self.cond.predicate, source, size, lengths)
        for check in reversed(self.checks):
            if not check.users:
                module.graph.erase_node(check)
        for readers in results_of(node).values():
            for reader in readers:
                for user in list(reader.users):
                    if user.target is aten.sym_size.int and self._has(user.meta["val"]):
                        swap(user, size)
        replace_results(None, node, [self.cond.operands[self.prefixes[i][0]] for i in range(len(self.prefixes))])
        for head in self.heads:
            head_source, head_dim, *_ = slice_args(head)
            if expression(head_source.meta["val"].shape[head_dim]) == self.size:
                swap(head, head_source)
            elif size not in head.all_input_nodes and not isinstance(size, Node):
                head.args = (head_source, head_dim, 0, size)
        substitute(module, {self.symbol: self.size})
        for attention in self.over_keys:
            hide_keys(module, attention, mask, size)
        for closing in self.closings:
            rest: Any = self.rows[closing.args[0][1]]  # type: ignore[index]
            join(program, module, closing, rest.whole, rest.dim, mask, size)


def _shape_of(value: torch.Tensor) -> list[sympy.Expr]:
    return [expression(size) for size in value.shape]


def _value(bound: Any) -> Any:
    """A slice's bound as an expression: comparing symbolic sizes themselves would add guards."""
    return None if bound is None else expression(bound.meta["val"] if isinstance(bound, Node) else bound)


def _prefix(node: Any, dim: int, ends: Sequence[Any]) -> tuple[Any, Any]:
    """(tensor, how many of its first rows along ``dim``; None for all): what ``node`` is, copies aside."""
    length = None
    while node not in ends:
        if not isinstance(node, Node) or node.op != "call_function":
            raise NotRowsError("the branches do more than take the first rows of an operand")
        if node.target in _COPIES:
            node = node.args[0]
            continue
        if node.target is not aten.slice.Tensor or length is not None:
            raise NotRowsError("the branches do more than take the first rows of an operand")
        source, at, start, end, step = slice_args(node)
        if at % source.meta["val"].dim() != dim or _value(start) not in (0, None) or step != 1 or end is None:
            raise NotRowsError("a branch takes other rows than the first")
        node, length = source, end
    return node, length
