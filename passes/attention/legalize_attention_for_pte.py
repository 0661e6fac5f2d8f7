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
from sam3x.passes.base import MatchFailure, NoMatchError, Pass, PassResult
from sam3x.passes.graph.aten_nodes import SDPA, argument, aten, expression
from sam3x.passes.graph.constants import Constants
from sam3x.passes.graph.emitter import Emitter, fake_mode_of
from sam3x.passes.graph.view_layout import Digit, Layout, layout_of

_CAT = 4
LOWEST = torch.finfo(torch.float32).min
LOWEST_HALF = torch.finfo(torch.float16).min / 2
SCORES = 64_000_000
"""Bytes that the scores of one head may take for each image; more are computed in parts, a number of queries at a time."""


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
        masks, visible = self._masks()
        outputs = []
        for head in range(self.heads):
            query, key, value = (side(head) for side in sides)
            mask, seen = masks(head), visible(head)
            by_row = seen is not None and seen.meta["val"].shape[1] != 1
            if seen is not None and not by_row:
                value = self.emit(aten.mul.Tensor, value, seen)  # the smallest tensor: what hidden keys weigh times zero
            output = self._attend(query, self.emit(aten.permute.default, key, [0, 2, 1]), value, mask)
            outputs.append(self.emit(aten.mul.Tensor, output, seen) if by_row else output)
        joined = self._join(outputs, 2)
        shape = joined.meta["val"].shape
        split = self.emit(
            aten.reshape.default,
            joined,
            [*_sizes(self.emit, joined, shape[:2]), self.heads, int(self.node.meta["val"].shape[-1])],
        )
        self.node.replace_all_uses_with(self.emit(aten.permute.default, split, [0, 2, 1, 3]))
        self.module.graph.erase_node(self.node)

    def _attend(self, query: Node, turned: Node, value: Node, mask: Node | None) -> Node:
        """One head: (batch, queries, width), (batch, width, keys), (batch, keys, width) → (batch, queries, width)."""
        parts = []
        for rows in self._parts(query.meta["val"].shape[1], turned.meta["val"].shape[2]):
            scores = self.emit(aten.bmm.default, self._rows_of(query, rows), turned)
            if mask is not None:
                scores = self.emit(aten.add.Tensor, scores, self._rows_of(mask, rows))
            parts.append(self.emit(aten.bmm.default, self.emit(aten._softmax.default, scores, -1, False), value))
        return self._join(parts, 1)

    def _parts(self, queries: Any, keys: Any) -> list[slice | None]:
        """Rows of queries whose scores fit in ``SCORES``; one None where all do, or where a size is known to a run alone."""
        if not isinstance(queries, int) or not isinstance(keys, int):
            return [None]
        size = 2 if self.lowest == LOWEST_HALF else 4
        step = math.ceil(queries / math.ceil(queries * keys * size / SCORES))
        return [slice(first, min(first + step, queries)) for first in range(0, queries, step)] if step < queries else [None]

    def _rows_of(self, value: Node, rows: slice | None) -> Node:
        if rows is None or value.meta["val"].shape[1] == 1:
            return value
        return self.emit(aten.slice.Tensor, value, 1, rows.start, rows.stop)

    def _join(self, parts: list[Node], dim: int) -> Node:
        """``cat`` of at most four at a time, as XNNPACK takes them."""
        while len(parts) > 1:
            groups = [parts[start : start + _CAT] for start in range(0, len(parts), _CAT)]
            parts = [self.emit(aten.cat.default, group, dim) if len(group) > 1 else group[0] for group in groups]
        return parts[0]

    # --- projections

    def _projection(self, side: Node, scale: float) -> Callable[[int], Node]:
        """head → (batch, length, width) of one side, projected on its own; zeros where canonicalization clears a row."""
        cleared = _cleared(side)
        if cleared is not None:
            seen, side = cleared
            flags = self.emit(aten._to_copy.default, self._of_four(seen), dtype=torch.float32)
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

    # --- masks

    def _masks(self) -> tuple[Callable[[int], Node | None], Callable[[int], Node | None]]:
        """head → what is added to its scores, and head → 1.0 where a row sees a key, 0.0 where it sees none."""
        if self.mask is None:
            return (lambda head: None), (lambda head: None)
        mask = self._of_four(self.mask)
        shared = self._without_heads(mask)
        additive: dict[int, Node] = {}
        seen: dict[int, Node | None] = {}

        def make(head: int) -> None:
            key = 0 if shared is not None or mask.meta["val"].shape[1] == 1 else head
            if key not in additive:
                source = shared if shared is not None else self.emit(aten.select.int, mask, 1, key)
                additive[key], seen[key] = self._additive(source)
            additive[head], seen[head] = additive[key], seen[key]

        return (lambda head: make(head) or additive[head]), (lambda head: seen[head])  # type: ignore[func-returns-value]

    def _of_four(self, mask: Node) -> Node:
        """``mask`` with sizes of 1 in front, so that it has four dimensions."""
        shape = mask.meta["val"].shape
        missing = [1] * (4 - len(shape))
        return self.emit(aten.reshape.default, mask, missing + _sizes(self.emit, mask, shape)) if missing else mask

    def _without_heads(self, mask: Node) -> Node | None:
        """(batch, queries or 1, keys) when the mask is a view that repeats one for all heads."""
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
        return self.emit(aten.reshape.default, source, _sizes(self.emit, source, shape))

    def _additive(self, mask: Node) -> tuple[Node, Node | None]:
        """What is added, and 1.0 where a row sees a key, 0.0 where it sees none; None where each is known to see one.

        Nothing infinite reaches the softmax: −inf becomes the lowest number, which no other value is near.
        """
        emit = self.emit
        low, half, zero = (emit(aten.full.default, [], x, dtype=torch.float32) for x in (self.lowest, self.lowest / 2, 0.0))
        if mask.meta["val"].dtype is torch.bool:
            visible = mask
            additive = emit(aten.where.self, mask, zero, low)
        else:
            visible = emit(aten.gt.Scalar, mask, float("-inf"))
            number = emit(aten.where.self, emit(aten.lt.Scalar, mask, self.lowest / 2), half, mask)
            additive = emit(aten.where.self, visible, number, low)
        if hides_no_row(mask):
            return additive, None
        seen = emit(aten.any.dim, visible, -1, True)
        return additive, emit(aten._to_copy.default, seen, dtype=torch.float32)


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
