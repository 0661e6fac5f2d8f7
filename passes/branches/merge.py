"""One node outside for two that correspond in the branches of a conditional."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import CallMethodKey, GuardOnDataDependentSymNode
from torch.utils._pytree import SequenceKey
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from sam3x.passes.base import NoMatchError
from sam3x.passes.branches.align import COMMUTATIVE
from sam3x.passes.branches.region import (
    MISSING,
    Region,
    Side,
    is_size,
    is_unbacked,
    memory_order,
    sizes_are,
    sizes_of,
    val_of,
    views_of,
)
from sam3x.passes.graph.aten_nodes import SDPA, argument, aten, expression, slice_args
from sam3x.passes.graph.cond_graph import COND, Cond, attach, is_cond, is_heavy, substitute
from sam3x.passes.graph.emitter import Emitter, fake_mode_of, quietly, size_of


class Merger:
    """Values outside a conditional for pairs of values inside it. Adds nodes before it; ``undo`` takes them away again."""

    def __init__(self, module: GraphModule, cond: Cond) -> None:
        self.module, self.cond = module, cond
        self.fake_mode: Any = fake_mode_of(module)
        self.views: dict[Node, Any] = views_of(cond)
        self.emit = Emitter(module, cond.node, val=self.val)
        self.sides = tuple(Side(branch, cond.operands) for branch in cond.branches)
        self.pairs: dict[tuple[Any, Any], Any] = {}
        self.failed: set[tuple[Any, Any]] = set()
        self.sizes: dict[tuple[sympy.Expr, sympy.Expr], Node] = {}  # (in one branch, in the other) → the size outside
        self.symbols: dict[tuple[sympy.Expr, sympy.Expr], sympy.Expr] = {}
        self.before = set(module.graph.nodes)
        self.attached: list[str] = []
        self.moved = 0

    def undo(self) -> None:
        for node in reversed(list(self.module.graph.nodes)):
            if node not in self.before:
                self.module.graph.erase_node(node)
        for name in self.attached:
            delattr(self.module, name)

    def val(self, value: Any) -> Any:
        """What is known of a value: of an operand, what both branches know of it."""
        return self.views.get(value, value.meta.get("val")) if isinstance(value, Node) else value

    # --- without a conditional

    def free(self, true: Any, false: Any) -> Any:
        """The value outside that is ``true`` in one branch and ``false`` in the other, where it costs nothing; or MISSING."""
        true, false = self.sides[0].canonical(true), self.sides[1].canonical(false)
        if isinstance(true, (list, tuple)) and isinstance(false, (list, tuple)) and len(true) == len(false):
            items = [self.free(a, b) for a, b in zip(true, false, strict=True)]
            return MISSING if any(item is MISSING for item in items) else type(true)(items)
        if true is false or (not isinstance(true, Node) and not isinstance(false, Node)):
            return true if true is false or (type(true) is type(false) and true == false) else MISSING
        key = (true, false)
        if not isinstance(true, (Node, int)) or not isinstance(false, (Node, int)) or key in self.failed:
            return MISSING
        if key not in self.pairs:
            found = self._find(true, false)
            if found is MISSING:
                self.failed.add(key)
                return MISSING
            self.record(true, false, found)
        return self.pairs[key]

    def record(self, true: Any, false: Any, value: Any) -> None:
        true, false = self.sides[0].canonical(true), self.sides[1].canonical(false)
        self.pairs[true, false] = value
        for side, node in zip(self.sides, (true, false), strict=True):
            if isinstance(node, Node) and node.graph is side.branch.graph:
                side.known.setdefault(node, value)
        self.failed.clear()  # what stood in the way of others may be this
        if isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor):
            for left, right, swapped in ((true, false, False), (false, true, True)):
                self._close(left, right, value, swapped)

    def _inside(self, side: int, value: Any) -> bool:
        return isinstance(value, Node) and value.graph is self.sides[side].branch.graph

    def _find(self, true: Any, false: Any) -> Any:
        if is_size(true) and is_size(false):
            found = self._size(true, false)
            if found is not MISSING:
                return found
        both = self._inside(0, true) and self._inside(1, false)
        if both and true.target is false.target and true.op == "call_function" and not is_cond(true):
            pure = not true.is_impure() or true.target is SDPA
            found = self._congruent(true, false) if pure else MISSING
            if found is not MISSING:
                return found
        return self._sliced(true, false)

    def _congruent(self, true: Node, false: Node) -> Any:
        """The same operator on the same values."""
        if true.kwargs.keys() != false.kwargs.keys() or len(true.args) != len(false.args):
            return MISSING
        orders = [list(false.args)]
        if true.target in COMMUTATIVE:
            orders.append([false.args[1], false.args[0], *false.args[2:]])
        for order in orders:
            args = self.free(list(true.args), order)
            kwargs = self.free(list(true.kwargs.values()), list(false.kwargs[key] for key in true.kwargs))
            if args is not MISSING and kwargs is not MISSING:
                return self.node(true, args, dict(zip(true.kwargs, kwargs, strict=True)), false)
        return MISSING

    def node(self, like: Node, args: Sequence[Any], kwargs: dict[str, Any], other: Node) -> Any:
        """Add outside what ``like`` is in one branch and ``other`` in the other."""
        try:
            value = self._agreed(like.meta["val"], other.meta["val"])
            made = self.emit(like.target, *args, **kwargs) if value is None else self._add(like.target, args, kwargs, value)
        except GuardOnDataDependentSymNode:
            return MISSING  # the operator needs to know a size that only a run can tell
        self.moved += is_heavy(like)
        made.meta.update({k: v for k, v in like.meta.items() if k in ("stack_trace", "nn_module_stack")})
        return made

    def _add(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any], value: torch.Tensor) -> Node:
        with self.module.graph.inserting_before(self.cond.node):
            node = self.module.graph.call_function(target, tuple(args), kwargs)
        node.meta["val"] = value
        return node

    def _agreed(self, true: Any, false: Any) -> torch.Tensor | None:
        """The value for either of two tensors when no new size is needed."""
        if not isinstance(true, torch.Tensor) or not isinstance(false, torch.Tensor):
            return None
        pairs = zip(true.shape, false.shape, strict=True)
        sizes = [self._known_size((expression(a), expression(b))) for a, b in pairs]
        return None if None in sizes else self._shaped(true, sizes)

    def _shaped(self, like: torch.Tensor, sizes: Sequence[Any]) -> torch.Tensor:
        """A value of these sizes, its dimensions in ``like``'s order in memory."""
        order = memory_order(like)
        with quietly(self.fake_mode):
            inner = torch.empty([size_of(self.fake_mode, sizes[d]) for d in order], dtype=like.dtype, device=like.device)
            return inner.permute([order.index(d) for d in range(like.dim())])

    def _size(self, true: Any, false: Any) -> Any:
        pair = tuple(expression(self.val(value)) for value in (true, false))
        if pair[0] == pair[1]:
            for side, value in zip(self.sides, (true, false), strict=True):
                found = self._hoisted(side, value)
                if found is not MISSING:
                    return found
        return self.sizes.get(pair, MISSING)

    def _hoisted(self, side: Side, value: Any) -> Any:
        """A size that both branches agree on, computed outside as this branch does."""
        value = side.canonical(value)
        if not isinstance(value, Node) or value.graph is not side.branch.graph:
            return value
        if value in side.known:
            return side.known[value]
        args = [self._hoisted(side, item) if is_size(item) else side.known.get(item, MISSING) for item in value.args]
        return MISSING if any(item is MISSING for item in args) else self.emit(value.target, *args)

    # --- nodes that do nothing in one of the branches

    def _sliced(self, true: Any, false: Any) -> Any:
        """The first rows in one branch, all of them in the other: a slice up to a size that depends on the branch."""
        for side, one, other in ((0, true, false), (1, false, true)):
            if (
                not self._inside(side, one)
                or one.target is not aten.slice.Tensor
                or not isinstance(self.val(other), torch.Tensor)
            ):
                continue
            source, dim, start, end, step = slice_args(one)
            if start not in (0, None) or step != 1 or not is_size(end) or self.val(other).dim() != one.meta["val"].dim():
                continue
            dim %= one.meta["val"].dim()
            if expression(one.meta["val"].shape[dim]) != expression(val_of(end)):
                continue  # the end lies beyond the tensor
            whole = self.free(*self._order(side, source, other))
            if not isinstance(whole, Node):
                continue
            full = sizes_of(self.val(whole))
            if full[dim] != expression(self.val(other).shape[dim]):
                continue
            size = self._row_count(side, end, whole, dim)
            if size is not MISSING:
                full[dim] = expression(size.meta["val"])
                return self._add(aten.slice.Tensor, (whole, dim, 0, size), {}, self._shaped(self.val(whole), full))
        return MISSING

    @staticmethod
    def _order(side: int, one: Any, other: Any) -> tuple[Any, Any]:
        return (other, one) if side else (one, other)

    def _row_count(self, side: int, end: Any, whole: Node, dim: int) -> Any:
        """``end`` in one branch, all of ``whole``'s ``dim`` in the other: the size of a vector that a conditional chooses."""
        full = expression(self.val(whole).shape[dim])
        key = self._order(side, expression(val_of(end)), full)
        if key not in self.sizes:
            vector = self._vector(side, end, full) or self._picked(whole, dim)
            region = Region(self.sides, self.val)
            made: list[Any] = [None, None]
            rows = region.row_vector(side, end, vector)
            made[side], made[1 - side] = rows, region.operand(1 - side, vector, vector)
            try:
                self._finish(region, [tuple(made)])
            except GuardOnDataDependentSymNode:
                return MISSING
        return self.sizes.get(key, MISSING)

    def _picked(self, whole: Node, dim: int) -> Node:
        """A vector along one dimension."""
        vector = whole
        for other in reversed(range(self.val(whole).dim())):
            if other != dim:
                vector = self.emit(aten.select.int, vector, other, 0)
        return vector

    def _vector(self, side: int, end: Any, full: Any) -> Node | None:
        """The vector that a branch's own conditional chooses rows of: the same one outside lets the two become one."""
        result = end.args[0] if isinstance(end, Node) and end.target is aten.sym_size.int else None
        made = result.args[0] if isinstance(result, Node) and result.target is operator.getitem else None
        for item in made.args[3] if isinstance(made, Node) and is_cond(made) else ():
            if isinstance(item, Node) and sizes_are(item, [full]):
                picks = [item]
                while picks[-1].target is aten.select.int and picks[-1] not in self.sides[side].known:
                    picks.append(picks[-1].args[0])
                vector = self.sides[side].known.get(picks.pop())
                if isinstance(vector, Node):
                    for pick in reversed(picks):
                        vector = self.emit(aten.select.int, vector, *pick.args[1:])
                    return vector
        return None

    def _close(self, true: Any, false: Any, value: Node, swapped: bool) -> None:
        """``cat([rows, rest])`` where the other branch has no rest: outside, the rest is empty when it takes that branch."""
        side = int(swapped)
        if not self._inside(side, true) or not isinstance(self.val(false), torch.Tensor):
            return
        for user in list(true.users):
            parts: Any = user.args[0] if user.target is aten.cat.default else ()
            if (
                len(parts) != 2
                or parts[0] is not true
                or not isinstance(parts[1], Node)
                or parts[1].target is not aten.slice.Tensor
            ):
                continue
            source, dim, start, end, step = slice_args(parts[1])
            along = argument(user, 1, "dim", 0)
            rank = user.meta["val"].dim()
            base = self.sides[side].known.get(source)
            if dim % rank != along % rank or not is_size(start) or step != 1 or not isinstance(base, Node):
                continue
            dim %= rank
            total = expression(self.val(base).shape[dim])
            rows = self.sizes.get(self._order(side, expression(val_of(start)), total))
            to_end = end is None or expression(val_of(end)) in (total, sympy.Integer(2**63 - 1))
            if rows is None or not to_end or expression(self.val(false).shape[dim]) != total:
                continue
            key = self._order(side, user, false)
            if key in self.pairs:
                continue
            full: Any = int(total) if total.is_Integer else self.emit(aten.sym_size.int, base, dim)
            sizes = sizes_of(self.val(base))
            sizes[dim] = total - expression(rows.meta["val"])
            rest = self._add(aten.slice.Tensor, (base, dim, rows, full), {}, self._shaped(self.val(base), sizes))
            made = self._add(aten.cat.default, ([value, rest], dim), {}, user.meta["val"])
            self.record(*key, made)
            other = self.sides[1 - side]
            if self._inside(1 - side, false):
                other.known[false] = made  # of a size that is known, where the rows' is not

    # --- with one

    def choose(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """One conditional for all ``pairs``, holding what lies between them and the values known outside."""
        region = Region(self.sides, self.val)
        returned = []
        for true, false in pairs:
            true, false = self._of_one_size(true, false)
            returned.append(tuple(region.need(side, value) for side, value in enumerate((true, false))))
        results = self._finish(region, returned)
        for (true, false), result in zip(pairs, results, strict=True):
            self.record(true, false, result)

    def _of_one_size(self, true: Any, false: Any) -> tuple[Any, Any]:
        """Where the sizes differ, a value that one branch takes as it is, by the one outside that has the size of both."""
        values: list[Any] = [true, false]
        sizes = [sizes_of(self.val(value)) for value in values]
        if sizes[0] != sizes[1] and len(sizes[0]) == len(sizes[1]):
            common = [self._known_size(pair) for pair in zip(*sizes, strict=True)]
            for side in range(2):
                wanted = self.sides[side].canonical(values[side])
                for key, made in self.pairs.items():
                    if key[side] is wanted and isinstance(made, Node) and sizes_of(made.meta["val"]) == common:
                        values[side] = made
        return values[0], values[1]

    def _finish(self, region: Region, returned: Sequence[tuple[Node, Node]]) -> list[Node]:
        graphs = region.close(returned)
        for side, part in enumerate(graphs):
            # one symbol for the size of a branch and for the size outside, where the branch does not make it itself
            inner = {symbol for node in part.graph.nodes for symbol in node.meta.get("unbacked_bindings", {})}
            substitute(
                part,
                {key[side]: size for key, size in self.symbols.items() if is_unbacked(key[side]) and key[side] not in inner},
            )
        names = [attach(self.module, graph, name) for graph, name in zip(graphs, ("true_graph", "false_graph"), strict=True)]
        self.attached += names
        graph = self.module.graph
        with graph.inserting_before(self.cond.node):
            branches = [graph.get_attr(name) for name in names]
            node = graph.call_function(COND, (self.cond.predicate, *branches, tuple(region.operands)))
        values, found = [], []
        bindings: dict[Any, Any] = {}
        returned = list(zip(*(part.graph.output_node().args[0] for part in graphs), strict=True))
        for index, (true, false) in enumerate(returned):
            value, fresh = self._joined(true.meta["val"], false.meta["val"])
            values.append(value)
            for symbol, dim, key in fresh:
                bindings[symbol] = (SequenceKey(index), CallMethodKey("size"), SequenceKey(dim))
                found.append((index, dim, key))
        node.meta["val"] = tuple(values)
        if bindings:
            node.meta["unbacked_bindings"] = bindings
        results = []
        for index, value in enumerate(values):
            with graph.inserting_before(self.cond.node):
                results.append(graph.call_function(operator.getitem, (node, index)))
            results[-1].meta["val"] = value
        for index, dim, key in found:
            self.sizes[key] = self.emit(aten.sym_size.int, results[index], dim)
        return results

    def _joined(self, true: torch.Tensor, false: torch.Tensor) -> tuple[torch.Tensor, list]:
        """A value for either of two: sizes that differ are a symbol, one symbol for each pair of sizes."""
        if true.dtype is not false.dtype or true.dim() != false.dim() or true.device != false.device:
            raise NoMatchError(f"an operand is {tuple(true.shape)} {true.dtype} or {tuple(false.shape)} {false.dtype}")
        shape, fresh = [], []
        env = self.fake_mode.shape_env
        for dim, (left, right) in enumerate(zip(true.shape, false.shape, strict=True)):
            key = (expression(left), expression(right))
            known = self._known_size(key)
            if known is None:
                if env is None:
                    raise NoMatchError("the branches' sizes differ and the graph has no symbols")
                with quietly(self.fake_mode):
                    known = env.create_unbacked_symint().node.expr
                env.var_to_range[known] = ValueRanges(2, int_oo)  # as torch assumes of every dynamic size while tracing
                self.symbols[key] = known
                fresh.append((known, dim, key))
            shape.append(known)
        return self._shaped(true, shape), fresh

    def _known_size(self, key: tuple[sympy.Expr, sympy.Expr]) -> sympy.Expr | None:
        if key[0] == key[1]:
            return key[0]
        if any(size == symbol for size in key for symbol in self.symbols.values()):
            return next(size for size in key if size in self.symbols.values())
        if key in self.symbols:
            return self.symbols[key]
        for (true, false), symbol in self.symbols.items():
            left, right = key[0].subs(true, symbol), key[1].subs(false, symbol)
            if left == right and left.has(symbol):
                return left
        return None
