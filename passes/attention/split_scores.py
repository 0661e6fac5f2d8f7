"""Scores of a number of queries that a run decides, in parts that fit in memory where the run has the most of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Node

from sam3x.capture.program import erase_dead
from sam3x.passes.attention.legalize_attention_for_pte import SCORES, concatenated
from sam3x.passes.base import Pass, PassResult
from sam3x.passes.graph.aten_nodes import aten, expression, same_shape, shape_of
from sam3x.passes.graph.emitter import Emitter, following, quietly

_DYNAMIC = 2
"""By how much smaller parts are than those of fixed sizes: queries and their parts are tensors of their own here."""


class SplitScoresPass(Pass):
    """``bmm``, masks, ``softmax``, ``bmm`` of a dynamic number of queries → the same for each of n parts of the queries.

    n follows from the largest sizes and is at most the fewest queries, so that no part is empty; the last part has the rest.
    """

    name = "split_scores"

    def __init__(self, dim_names: Mapping[str, str], ranges: Mapping[str, tuple[int, int]]) -> None:
        """``dim_names``: symbol → what it means; ``ranges``: that → inclusive sizes."""
        self.ranges = {symbol: ranges[meaning] for symbol, meaning in dim_names.items() if meaning in ranges}

    def call(self, program: ExportedProgram) -> PassResult:
        module = program.graph_module
        bounds: dict[Any, list[Any]] = {}
        masks_of: dict[Any, Node] = {}
        rewrites = 0
        for node in list(module.graph.find_nodes(op="call_function", target=aten._softmax.default)):
            found = _scores(node)
            if found is None or (parts := self._parts(node)) < 2:
                continue
            query, masks, output = found
            count = node.meta["val"].shape[1]
            key = (expression(count), parts)
            if key not in bounds:
                first = next(item for item in module.graph.nodes if item.op == "placeholder" and _dim(item, count) is not None)
                bounds[key] = _bounds(Emitter(module, following(first)), first, _dim(first, count), parts)
            emit = Emitter(module, output)
            joined = concatenated(
                emit,
                [
                    _part(emit, node, query, [_mask_of(emit, masks_of, mask, rows) for mask in masks], output, rows)
                    for rows in bounds[key]
                ],
                1,
            )
            joined.meta["val"] = output.meta["val"]
            output.replace_all_uses_with(joined)
            rewrites += 1
        erase_dead(module)
        return PassResult(rewrites=rewrites)

    def _parts(self, scores: Node) -> int:
        _, queries, keys = scores.meta["val"].shape
        if isinstance(queries, int) or str(queries) not in self.ranges:
            return 1
        low, high = self.ranges[str(queries)]
        most = keys if isinstance(keys, int) else self.ranges.get(str(keys), (1, 1))[1]
        size = scores.meta["val"].element_size()
        return min(math.ceil(high * most * size * _DYNAMIC / SCORES), low) if high * most * size > SCORES else 1


def _scores(softmax: Node) -> tuple[Node, list[Node], Node] | None:
    """(queries, masks, product with the values) of a softmax that is attention's, over (batch, queries, keys)."""
    users = list(softmax.users)
    if softmax.meta["val"].dim() != 3 or softmax.args[1] not in (-1, 2) or len(users) != 1:
        return None
    product: Any = softmax.args[0]
    masks: list[Any] = []
    while isinstance(product, Node) and product.target is aten.add.Tensor and len(product.users) == 1:
        masks.insert(0, product.args[1])
        product = product.args[0]
    both = (product, users[0])
    if (
        any(not isinstance(node, Node) or node.target is not aten.bmm.default for node in both)
        or users[0].args[0] is not softmax
    ):
        return None
    return (product.args[0], masks, users[0]) if all(isinstance(item, Node) for item in masks) else None  # type: ignore


def _dim(node: Node, size: Any) -> int | None:
    """The dimension of a tensor that has that size."""
    shape = getattr(node.meta.get("val"), "shape", ())
    return next((dim for dim, own in enumerate(shape) if expression(own) == expression(size)), None)


def _bounds(emit: Emitter, tensor: Node, dim: int | None, parts: int) -> list[Any]:
    """(start, end) of every part, as nodes or numbers, with the size it has."""
    count = emit(aten.sym_size.int, tensor, dim)
    step = emit(operator.floordiv, count, parts)
    ends = [0, step, *(emit(operator.mul, step, index) for index in range(2, parts)), count]
    with quietly(emit.fake_mode):
        whole, one = count.meta["val"], step.meta["val"]
        sizes = [*[one] * (parts - 1), one + whole % parts]  # in words whose upper end is known
    return list(zip(ends[:-1], ends[1:], sizes, strict=True))


def _rows_of(emit: Emitter, value: Node, rows: Any) -> Node:
    """Some rows of (batch, queries, width); of one row for all that one."""
    batch, length, width = value.meta["val"].shape
    if isinstance(length, int) and length == 1:
        return value
    return emit.shaped(value, (batch, rows[2], width), aten.slice.Tensor, value, 1, *rows[:2])


def _mask_of(emit: Emitter, known: dict[Any, Node], mask: Node, rows: Any) -> Node:
    """Some rows of a mask, once for all heads; of one that is chosen by bools, those are sliced, which take a quarter."""
    key = (mask, str(rows[:2]))
    if key not in known:
        chosen: Any = mask.args[0] if mask.target is aten.where.self else mask
        numbers = mask.args[1:] if mask.target is aten.where.self else ()
        plain = chosen is not mask and same_shape(shape_of(chosen), shape_of(mask)) and shape_of(mask)[1] != 1
        if plain and not any(shape_of(item) for item in numbers):  # type: ignore[arg-type]
            part = _rows_of(emit, chosen, rows)
            known[key] = emit.shaped(mask, shape_of(part), aten.where.self, part, *numbers)
        else:
            known[key] = _rows_of(emit, mask, rows)
    return known[key]


def _part(emit: Emitter, softmax: Node, query: Node, masks: list[Node], output: Node, rows: Any) -> Node:
    """The output of some rows of the queries, ``masks`` their own."""
    product: Any = softmax.args[0]
    while product.target is aten.add.Tensor:
        product = product.args[0]
    batch, _, keys = softmax.meta["val"].shape
    shape = (batch, rows[2], keys)
    scores = emit.shaped(softmax, shape, aten.bmm.default, _rows_of(emit, query, rows), product.args[1])
    for mask in masks:
        scores = emit.shaped(softmax, shape, aten.add.Tensor, scores, mask)
    weights = emit.shaped(softmax, shape, aten._softmax.default, scores, *softmax.args[1:])
    return emit.shaped(output, (batch, rows[2], output.meta["val"].shape[2]), aten.bmm.default, weights, output.args[1])
