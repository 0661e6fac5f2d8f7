"""ONNX loops made while torch's converter records: one step for every slice (``for_each``), and tiles of rows (``Tiles``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sam3x.targets.onnx.linear import opset

if TYPE_CHECKING:
    import onnx_ir as ir

TILE_BYTES = 2 << 20
"""Scores (or hidden layer) of one tile, where the budget leaves a choice: what stays in a core's share of the cache."""
TILE_ROWS = 96
"""Fewest queries of a tile, where the budget leaves a choice: below, the products lose more than the cache gains."""


def node(op_type: str, inputs: Sequence[Any], *, domain: str = "", version: int | None = 18, **attributes: Any) -> ir.Value:
    """A node that onnxscript has no function for, put among those the converter records; its one output."""
    import onnx_ir as ir
    from torch.onnx._internal.exporter import _core

    assert _core.current_tracer is not None
    made = ir.node(op_type, inputs, attributes=attributes or None, domain=domain, version=version)
    _core.current_tracer.nodes.append(made)
    return made.outputs[0]


def ints(*values: int) -> ir.Value:
    """A constant (len(values),) int64."""
    return opset().Constant(value_ints=[int(value) for value in values])


def largest_divisor(number: int, most: int) -> int:
    """Of ``number``, at most ``most``; 0 where ``most`` is below 1."""
    return max((count for count in range(1, min(most, number) + 1) if number % count == 0), default=0)


def repeat(count: ir.Value, body: Callable[[ir.Value], ir.Value], prefix: str) -> ir.Value:
    """``Loop``: ``body`` ``count`` times; the results one after the other, in a dimension of their own in front of the others.

    Reshape what comes out: onnx's ReferenceEvaluator joins the results in their first dimension, which is the same numbers in
    the same order.

    Args:
        count: () or (1,) int64.
        body: called once, to record the loop's graph, with the number of the step, () int64. It may use values from
            outside, and returns one with dtype and rank.
        prefix: begins the names of the graph's values; another one in every loop inside a loop.
    """
    import onnx_ir as ir
    from torch.onnx._internal.exporter import _core

    tracer = _core.current_tracer
    assert tracer is not None
    op = opset()
    step = ir.Value(name=f"{prefix}_step", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    before = ir.Value(name=f"{prefix}_goes_on", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    outside, tracer.nodes = tracer.nodes, []
    try:
        output = body(step)
        after = op.Identity(before)
        after.dtype, after.shape = ir.DataType.BOOL, ir.Shape([])
        nodes = tracer.nodes
    finally:
        tracer.nodes = outside
    for index, made in enumerate(nodes):
        for value in made.outputs:
            value.name = f"{prefix}_{made.op_type.lower()}_{index}"
    graph = ir.Graph([step, before], [after, output], nodes=nodes, name=prefix)
    return node("Loop", [count, op.Constant(value=ir.tensor(True))], body=graph)


def for_each(looped: Sequence[ir.Value], body: Callable[..., ir.Value], prefix: str) -> ir.Value:
    """``body`` once for every slice of dimension 0 of ``looped``, as ``repeat`` does; ``body`` gets these slices.

    The last of ``looped`` is counted: a tool that sorts nodes by their inputs alone, and does not see what a body reads, leaves
    the loop behind it.
    """
    import onnx_ir as ir

    op = opset()

    def one(step: ir.Value) -> ir.Value:
        given = []
        for value in looped:
            assert value.dtype is not None and value.shape is not None
            given.append(op.Gather(value, step, axis=0))
            given[-1].dtype, given[-1].shape = value.dtype, ir.Shape(value.shape[1:])
        return body(*given)

    return repeat(op.Squeeze(op.Shape(looped[-1], start=0, end=1)), one, prefix)


class Tiles:
    """A loop over tiles of queries; how many rows a tile has is worked out at run time, where this is made.

    The last tile is as long as the others and overlaps the one before it, so that nothing is padded.

    Args:
        lead: the sizes before the queries, (rank - 2,); None where there are none.
        queries: how many there are, (1,).
        row: bytes that the scores of a query take, (1,).
        budget: bytes that all scores may take.
        dtype: of the result.
        single: whether there is one tile, or ``lead`` is ones, whenever the graph runs.
    """

    def __init__(
        self,
        lead: ir.Value | None,
        queries: ir.Value,
        row: ir.Value,
        budget: int,
        dtype: ir.DataType,
        *,
        rank: int,
        single: bool = False,
    ) -> None:
        op = opset()
        self.lead, self.queries, self.dtype, self.rank, self.single = lead, queries, dtype, rank, single or lead is None
        one = ints(1)
        allowed = op.Div(ints(budget // 2), row)  # scores and probabilities of a tile are there at once
        wanted = op.Max(op.Div(ints(TILE_BYTES), row), ints(TILE_ROWS))
        rows = op.Max(op.Min(allowed, wanted, queries), one)
        self.count = op.Div(op.Sub(op.Add(queries, rows), one), rows)
        self.rows = op.Div(op.Sub(op.Add(queries, self.count), one), self.count)  # evenly
        self.latest = op.Sub(queries, self.rows)
        self.total, self.before = op.Mul(self.count, self.rows), op.Mul(op.Sub(self.count, one), self.rows)
        overlap = op.Sub(self.before, self.latest)
        self.rest = op.Add(self.before, overlap)  # where, in tiles one after the other, what is new in the last one begins
        self.steps = op.Squeeze(self.count)

    def run(self, body: Callable[[Callable[[ir.Value, int], ir.Value]], ir.Value], width: ir.Value) -> ir.Value:
        """Call ``body(tile)`` once, to record the loop's graph; ``tile(x, axis)`` is the tile's part of ``x``.

        Args:
            width: the last size of the result, (1,).
        """
        import onnx_ir as ir

        op = opset()
        axis = self.rank - 2

        def one_tile(step: ir.Value) -> ir.Value:
            start = op.Min(op.Mul(step, self.rows), self.latest)
            end = op.Add(start, self.rows)
            output = body(lambda x, dim: op.Slice(x, start, end, ints(dim)))
            output.dtype, output.shape = self.dtype, ir.Shape([None] * self.rank)
            return output

        made = repeat(self.steps, one_tile, "tile")
        lead = [] if self.lead is None else [self.lead]
        if not self.single:  # otherwise the tiles' dimension moves over ones, or is one
            made = op.Reshape(made, op.Concat(self.count, *lead, self.rows, width, axis=0))
            made = op.Transpose(made, perm=[*range(1, axis + 1), 0, axis + 1, axis + 2])
        joined = op.Reshape(made, op.Concat(*lead, self.total, width, axis=0))
        last = op.Slice(joined, self.rest, self.total, ints(axis))
        result = op.Concat(op.Slice(joined, ints(0), self.before, ints(axis)), last, axis=axis)
        result.dtype, result.shape = self.dtype, ir.Shape([None] * self.rank)
        return result
