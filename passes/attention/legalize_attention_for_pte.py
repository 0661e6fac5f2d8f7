"""Attention in the form XNNPACK runs best: one head after another, its own slice of the weights, no view in between."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import sympy
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sam3x.capture.program import erase_dead
from sam3x.passes.attention.guard import hides_no_row, read_sdpa
from sam3x.passes.attention.simplify_attention_masks import hiding
from sam3x.passes.base import MatchFailure, NoMatchError, Pass, PassResult
from sam3x.passes.graph.aten_nodes import SDPA, argument, aten, expression, same_shape
from sam3x.passes.graph.constants import Constants
from sam3x.passes.graph.emitter import Emitter, fake_mode_of
from sam3x.passes.graph.view_layout import Digit, Layout, layout_of

_CAT = 4
LOWEST = torch.finfo(torch.float32).min
LOWEST_HALF = torch.finfo(torch.float16).min / 2
SCORES = 64_000_000
"""Bytes that the scores of one head may take for each image; more are computed in parts, a number of queries at a time."""
_BESIDE_MASK = 4
"""By how much less where a mask of all pairs, one float a pair, stands beside them for the whole run."""


class LegalizeAttentionForPtePass(Pass):
    """``scaled_dot_product_attention`` over projected heads → for each head ``linear``, ``bmm``, ``softmax``, ``bmm``.

    A head's queries, keys and values are products with its rows of the projection, which become weights of their own, the scale
    folded in. So no head is split off or expanded at run time, the scores of one head stand in memory at a time, of known sizes
    at most ``SCORES`` bytes of them, and XNNPACK takes it whole. A row whose keys are all masked gets zeros, as from torch.
    """

    name = "legalize_attention_for_pte"
    run_after = ("canonicalize_attention", "canonicalize_layouts", "fold_constants")

    def __init__(self, lowest: float = LOWEST) -> None:
        """``lowest`` is added to the scores of hidden keys: far below any score, and with one added still a finite number."""
        self.lowest = lowest

    def call(self, program: ExportedProgram) -> PassResult:
        module = program.graph_module
        constants = Constants(program, fake_mode_of(module))
        failures: list[MatchFailure] = []
        rewrites = 0
        for node in module.graph.find_nodes(op="call_function", target=SDPA):
            try:
                _Attention(module, constants, node, self.lowest).rewrite()
                rewrites += 1
            except NoMatchError as reason:
                failures.append(MatchFailure(node=node.name, reason=str(reason)))
        erase_dead(module)
        constants.drop_unused()
        return PassResult(rewrites=rewrites, match_failures=tuple(failures))


class _Attention:
    """One attention: (batch, heads, queries, width) throughout."""

    def __init__(self, module: GraphModule, constants: Constants, node: Node, lowest: float) -> None:
        self.module, self.constants, self.node, self.lowest = module, constants, node, lowest
        found = read_sdpa(node)
        self.query, self.key, self.value, self.mask, self.scale = found.query, found.key, found.value, found.mask, found.scale
        if node.meta["val"].dim() != 4 or node.meta["val"].dtype is not torch.float32:
            raise NoMatchError("not float32 of rank 4")
        if not isinstance(node.meta["val"].shape[1], int):  # one head, whose batch stands where heads do
            raise NoMatchError("the number of heads is no constant")
        self.heads = node.meta["val"].shape[1]
        self.emit = Emitter(module, node)

    def rewrite(self) -> None:
        sides = [
            self._projection(side, scale) for side, scale in ((self.query, self.scale), (self.key, 1.0), (self.value, 1.0))
        ]
        mask = _Masks(self.emit, self.mask, self.lowest) if self.mask is not None else None
        outputs = []
        for head in range(self.heads):
            query, key, value = (side(head) for side in sides)
            if mask is not None and not mask.by_row and (seen := mask.at(head, None)[1]) is not None:
                value = self.emit(aten.mul.Tensor, value, seen)  # the smallest tensor: what hidden keys weigh times zero
            outputs.append(self._attend(head, query, self.emit(aten.permute.default, key, [0, 2, 1]), value, mask))
        joined = concatenated(self.emit, outputs, 2)
        shape = joined.meta["val"].shape
        split = self.emit(
            aten.reshape.default,
            joined,
            [*_sizes(self.emit, joined, shape[:2]), self.heads, int(self.node.meta["val"].shape[-1])],
        )
        self.node.replace_all_uses_with(self.emit(aten.permute.default, split, [0, 2, 1, 3]))
        self.module.graph.erase_node(self.node)

    def _attend(self, head: int, query: Node, turned: Node, value: Node, mask: _Masks | None) -> Node:
        """One head: (batch, queries, width), (batch, width, keys), (batch, keys, width) → (batch, queries, width)."""
        parts = []
        by_row = mask is not None and mask.by_row
        for rows in self._parts(query.meta["val"].shape[1], turned.meta["val"].shape[2], by_row):
            scores = self.emit(aten.bmm.default, _rows_of(self.emit, query, rows), turned)
            additive, seen = mask.at(head, rows) if mask is not None else ([], None)
            for item in additive:
                scores = self.emit(aten.add.Tensor, scores, item)
            output = self.emit(aten.bmm.default, self.emit(aten._softmax.default, scores, -1, False), value)
            parts.append(self.emit(aten.mul.Tensor, output, seen) if by_row and seen is not None else output)
        return concatenated(self.emit, parts, 1)

    def _parts(self, queries: Any, keys: Any, by_row: bool) -> list[slice | None]:
        """Rows of queries whose scores fit; one None where all do, or where a size is known to a run alone."""
        if not isinstance(queries, int) or not isinstance(keys, int):
            return [None]
        size = 2 if self.lowest == LOWEST_HALF else 4
        fit = SCORES // _BESIDE_MASK if by_row else SCORES
        step = math.ceil(queries / math.ceil(queries * keys * size / fit))
        return [slice(first, min(first + step, queries)) for first in range(0, queries, step)] if step < queries else [None]

    # --- projections

    def _projection(self, side: Node, scale: float) -> Callable[[int], Node]:
        """head → (batch, length, width) of one side, projected on its own; zeros where canonicalization clears a row."""
        cleared = _cleared(side)
        if cleared is not None:
            seen, side = cleared
            flags = self.emit(aten._to_copy.default, _of_four(self.emit, seen), dtype=torch.float32)
            one = flags.meta["val"].shape[1] == 1
            plain = self._projection(side, scale)

            def clear(head: int) -> Node:
                return self.emit(aten.mul.Tensor, plain(head), self.emit(aten.select.int, flags, 1, 0 if one else head))

            return clear
        layout = layout_of(side)
        linear = layout.source
        if linear.target is not aten.linear.default:
            return self._sliced(side, scale)
        given = argument(linear, 2, "bias")
        weight, bias = self.constants.value(linear.args[1]), self.constants.value(given)
        if weight is None or (given is not None and bias is None):
            return self._sliced(side, scale)
        rows = self._rows(layout, int(side.meta["val"].shape[-1]))
        if rows is None:
            return self._sliced(side, scale)
        hint = linear.args[1].name.removeprefix("p_")

        def project(head: int) -> Node:
            picked = torch.from_numpy(rows[head])
            given = [self.constants.add(weight[picked] * scale, hint)]
            if bias is not None:
                given.append(self.constants.add(bias[picked] * scale, hint.replace("weight", "bias")))
            return self.emit(aten.linear.default, linear.args[0], *given)

        return project

    def _rows(self, layout: Layout, width: int) -> np.ndarray | None:
        """(heads, width) rows of the projection's weight, where the view takes whole batches and lengths; else None."""
        source = layout.source.meta["val"]
        if source.dim() != 3 or layout.dims[0] != layout.whole(0) or layout.dims[2] != layout.whole(1):
            return None
        if any(offset != 0 for dim, offset in layout.offsets.items() if dim != 2):
            return None
        start = layout.offsets.get(2, sympy.S.Zero)
        head, inner = (_steps(layout.dims[dim]) for dim in (1, 3))
        if head is None or inner is None or not start.is_Integer:
            return None
        rows = int(start) + head[:, None] + inner[None, :]
        return rows if rows.shape == (self.heads, width) else None

    def _sliced(self, side: Node, scale: float) -> Callable[[int], Node]:
        def part(head: int) -> Node:
            piece = self.emit(aten.select.int, side, 1, head)
            return piece if scale == 1.0 else self.emit(aten.mul.Tensor, piece, scale)

        return part


def concatenated(emit: Emitter, parts: list[Node], dim: int) -> Node:
    """``cat`` of at most four at a time, as XNNPACK takes them."""
    while len(parts) > 1:
        groups = [parts[start : start + _CAT] for start in range(0, len(parts), _CAT)]
        parts = [emit(aten.cat.default, group, dim) if len(group) > 1 else group[0] for group in groups]
    return parts[0]


class _Masks:
    """What is added to the scores of a head, and which of its rows see a key.

    A sum of masks that is larger than each of them (of all pairs, and of each image's keys) is never made: its parts are added
    to the scores one after another.
    """

    def __init__(self, emit: Emitter, mask: Node, lowest: float) -> None:
        self.emit = emit
        self.terms = [self._prepared(term) for term in self._terms(mask)]
        self.lowest = lowest / len(self.terms)  # all of them together are finite
        self.by_row = any(term.meta["val"].shape[-2] != 1 for term, _ in self.terms)
        self.sees_all = hides_no_row(mask)
        self.known: dict[Any, Any] = {}

    def at(self, head: int, rows: slice | None) -> tuple[list[Node], Node | None]:
        """What is added to the scores of these rows of a head, and 1.0 where a row sees a key, 0.0 where it sees none; None
        where each is known to see one."""
        found = [
            self._once(
                (index, self._head(term, head), str(rows)),
                lambda term=term, hides=hides: self._additive(  # type: ignore[misc]
                    self._part(term, head, rows), hides
                ),
            )
            for index, (term, hides) in enumerate(self.terms)
        ]
        visible = [item for _, item in found]
        seen = None if self.sees_all else self._once(tuple(visible), lambda: self._seen(visible))
        return [item for item, _ in found], seen

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def _terms(self, mask: Node) -> list[Node]:
        """The masks, of four dimensions each, whose sum (of bool masks: whose logical and) is ``mask``."""
        inner = mask
        while inner.target in (aten.reshape.default, aten.view.default):
            inner = inner.args[0]  # type: ignore[assignment]
        shape, whole = mask.meta["val"].shape, inner.meta["val"].shape
        ands = (aten.logical_and.default, aten.bitwise_and.Tensor)
        splits = inner.target is aten.add.Tensor or (inner.target in ands and mask.meta["val"].dtype is torch.bool)
        given = [item for item in inner.args if isinstance(item, Node)] if splits and not inner.kwargs else []
        as_is = len(shape) == len(whole)
        merged = len(shape) == 4 and len(whole) == 3 and same_shape(shape[2:], whole[1:])
        if len(given) != 2 or not ((as_is and same_shape(shape, whole)) or merged):
            return [_of_four(self.emit, mask)]
        shapes = [(1,) * (len(whole) - item.meta["val"].dim()) + tuple(item.meta["val"].shape) for item in given]
        if any(same_shape(size, whole) for size in shapes) or len({item.meta["val"].dtype for item in (inner, *given)}) > 1:
            return [_of_four(self.emit, mask)]
        if as_is:
            return [_of_four(self.emit, item) for item in given]
        fronts = [(1, 1) if isinstance(size[0], int) and size[0] == 1 else tuple(shape[:2]) for size in shapes]
        return [
            self.emit(aten.reshape.default, item, self.emit.sizes([*front, *size[1:]]))
            for item, front, size in zip(given, fronts, shapes, strict=True)
        ]

    def _prepared(self, term: Node) -> tuple[Node, bool]:
        """(batch, queries or 1, keys) of a mask that is one for all heads, else four dimensions, and whether True hides."""
        shared = self._without_heads(term)
        return shared if shared is not None else (term, False)

    def _without_heads(self, mask: Node) -> tuple[Node, bool] | None:
        """(batch, queries or 1, keys) when the mask is a view that repeats one for all heads, and whether True hides."""
        layout = layout_of(mask)
        batch, heads, queries, keys = layout.dims
        repeated = not heads or all(digit.dim < 0 for digit in heads)
        plain = [digit for digits in (batch, queries, keys) for digit in digits]
        if not repeated or any(digit.dim < 0 or (digit,) != layout.whole(digit.dim) for digit in plain):
            return None
        source, order = layout.source, [digit.dim for digit in plain]
        ones = [dim for dim in range(source.meta["val"].dim()) if dim not in order]
        if order != sorted(order) or any(layout.whole(dim) for dim in ones):
            return None
        shape = [source.meta["val"].shape[digits[0].dim] if digits else 1 for digits in (batch, queries, keys)]
        padding = hiding(source)  # of numbers that only hide: what they were made of takes a quarter
        if padding is None or not same_shape(padding[0].meta["val"].shape, source.meta["val"].shape):
            padding = source, True
        source, visible = padding
        return self.emit(aten.reshape.default, source, _sizes(self.emit, source, shape)), not visible

    def _head(self, term: Node, head: int) -> int:
        """The head whose mask is that of ``head``."""
        return head if term.meta["val"].dim() == 4 and term.meta["val"].shape[1] != 1 else 0

    def _part(self, term: Node, head: int, rows: slice | None) -> Node:
        one = term if term.meta["val"].dim() == 3 else self.emit(aten.select.int, term, 1, self._head(term, head))
        return _rows_of(self.emit, one, rows)

    def _additive(self, mask: Node, hides: bool) -> tuple[Node, Node]:
        """What is added, and bool, True where a key is seen.

        Nothing infinite reaches the softmax: −inf becomes the lowest number, which no other value is near.
        """
        emit = self.emit
        low, half, zero = (emit(aten.full.default, [], x, dtype=torch.float32) for x in (self.lowest, self.lowest / 2, 0.0))
        if mask.meta["val"].dtype is torch.bool:
            visible = emit(aten.logical_not.default, mask) if hides else mask
            return emit(aten.where.self, visible, zero, low), visible
        visible = emit(aten.gt.Scalar, mask, float("-inf"))
        number = emit(aten.where.self, emit(aten.lt.Scalar, mask, self.lowest / 2), half, mask)
        return emit(aten.where.self, visible, number, low), visible

    def _seen(self, visible: list[Node]) -> Node:
        """(batch, queries or 1, 1), 1.0 where a row sees a key that every mask shows."""
        both = visible[0]
        for item in visible[1:]:
            both = self.emit(aten.logical_and.default, both, item)
        return self.emit(aten._to_copy.default, self.emit(aten.any.dim, both, -1, True), dtype=torch.float32)


def _of_four(emit: Emitter, mask: Node) -> Node:
    """``mask`` with sizes of 1 in front, so that it has four dimensions."""
    shape = mask.meta["val"].shape
    missing = [1] * (4 - len(shape))
    return emit(aten.reshape.default, mask, missing + _sizes(emit, mask, shape)) if missing else mask


def _rows_of(emit: Emitter, value: Node, rows: slice | None) -> Node:
    """A part of dimension 1; all of it where that is one row for all."""
    return (
        value if rows is None or value.meta["val"].shape[1] == 1 else emit(aten.slice.Tensor, value, 1, rows.start, rows.stop)
    )


def _cleared(side: Node) -> tuple[Node, Node] | None:
    """(rows, x) of ``where(rows, x, 0)``, rows bool (…, N or 1, 1)."""
    if side.target is not aten.where.self:
        return None
    rows, kept, zero = side.args
    known = isinstance(zero, Node) and zero.target is aten.full.default and zero.args[1] == 0
    plain = isinstance(kept, Node) and kept.meta["val"].shape == side.meta["val"].shape
    return (rows, kept) if known and plain and rows.meta["val"].shape[-1] == 1 else None  # type: ignore[return-value]


def _steps(digits: tuple[Digit, ...]) -> np.ndarray | None:
    """Every offset along dimension 2 that the digits count through; one that repeats stays where it is."""
    result = np.zeros(1, dtype=np.int64)
    for digit in digits:
        if digit.dim not in (2, -1) or not digit.size.is_Integer or not digit.stride.is_Integer:
            return None
        result = (result[:, None] + np.arange(int(digit.size))[None, :] * int(digit.stride)).reshape(-1)
    return result


def _sizes(emit: Emitter, source: Node, shape: Any) -> list[Any]:
    """A shape as arguments of a reshape of ``source``."""
    unknown = [index for index, size in enumerate(shape) if not expression(size).is_Integer]
    if len(unknown) == 1:
        return [-1 if index in unknown else int(size) for index, size in enumerate(shape)]
    dims = [expression(size) for size in source.meta["val"].shape]
    return [
        int(size) if index not in unknown else emit(aten.sym_size.int, source, dims.index(expression(size)))
        for index, size in enumerate(shape)
    ]
