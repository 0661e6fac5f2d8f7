"""ONNX loops made while torch's converter records: one step for every slice (``for_each``), and tiles of rows (``Tiles``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sam3x.targets.onnx.linear import opset

if TYPE_CHECKING:
    import onnx_ir as ir

TILE_BYTES = 4 << 20
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


def for_each(looped: Sequence[ir.Value], body: Callable[..., ir.Value], prefix: str, axis: int = 0) -> ir.Value:
    """``Scan``: ``body`` once for every slice of dimension 0 of ``looped``; the results stacked at ``axis``.

    Args:
        body: called once, to record the loop's graph, with a value for each of ``looped`` that lacks the first dimension.
            It may use values from outside, and returns one with dtype and rank.
        prefix: begins the names of the graph's values; another one in every loop inside a loop.
    """
    import onnx_ir as ir
    from torch.onnx._internal.exporter import _core

    tracer = _core.current_tracer
    assert tracer is not None
    given = []
    for index, value in enumerate(looped):
        assert value.dtype is not None and value.shape is not None
        given.append(ir.Value(name=f"{prefix}_in_{index}", type=ir.TensorType(value.dtype), shape=ir.Shape(value.shape[1:])))
    outside, tracer.nodes = tracer.nodes, []
    try:
        output = body(*given)
        nodes = tracer.nodes
    finally:
        tracer.nodes = outside
    for index, made in enumerate(nodes):
        for value in made.outputs:
            value.name = f"{prefix}_{made.op_type.lower()}_{index}"
    graph = ir.Graph(given, [output], nodes=nodes, name=prefix)
    return node("Scan", list(looped), body=graph, num_scan_inputs=len(given), scan_output_axes=[axis])


class Tiles:
    """A loop over tiles of queries; how many rows a tile has is worked out at run time.

    The last tile is as long as the others and overlaps the one before it, so that nothing is padded.

    Args:
        query: (…, N, …), N at dimension ``axis``.
        scores: how many scores a query has, (1,).
        budget: bytes that the scores may take.
    """

    def __init__(self, query: ir.Value, axis: int, scores: ir.Value, budget: int) -> None:
        op = opset()
        assert query.dtype is not None
        self.query, self.axis, self.dtype = query, axis, query.dtype
        one = ints(1)
        self.queries = op.Shape(query, start=axis, end=axis + 1)
        row = op.Mul(scores, ints(int(self.dtype.itemsize)))
        allowed = op.Div(ints(budget // 2), row)  # scores and probabilities of a tile are there at once
        wanted = op.Max(op.Div(ints(TILE_BYTES), row), ints(TILE_ROWS))
        rows = op.Max(op.Min(allowed, wanted, self.queries), one)
        self.count = op.Div(op.Sub(op.Add(self.queries, rows), one), rows)
        self.rows = op.Div(op.Sub(op.Add(self.queries, self.count), one), self.count)  # evenly

    def run(self, body: Callable[[Callable[[ir.Value, int], ir.Value]], ir.Value], width: ir.Value) -> ir.Value:
        """Call ``body(tile)`` once, to record the loop's graph; ``tile(x, axis)`` is the tile's part of ``x``.

        Args:
            width: the last size of the result, (1,).
        """
        import onnx_ir as ir

        op = opset()
        one, axis, rank = ints(1), ints(self.axis), len(self.query.shape)  # type: ignore[arg-type]
        index = op.Range(op.Constant(value_int=0), op.Squeeze(self.count), op.Constant(value_int=1))
        starts = op.Unsqueeze(op.Min(op.Mul(index, self.rows), op.Sub(self.queries, self.rows)), one)
        starts.dtype, starts.shape = ir.DataType.INT64, ir.Shape([None, 1])

        def one_tile(start: ir.Value) -> ir.Value:
            end = op.Add(start, self.rows)
            output = body(lambda x, dim: op.Slice(x, start, end, ints(dim)))
            output.dtype, output.shape = self.dtype, ir.Shape([None] * rank)
            return output

        made = for_each([starts], one_tile, "tile", self.axis)
        total, before = op.Mul(self.count, self.rows), op.Mul(op.Sub(self.count, one), self.rows)
        shape = [op.Shape(self.query, start=0, end=self.axis)] if self.axis else []
        shape.append(total)
        if self.axis + 2 < rank:
            shape.append(op.Shape(self.query, start=self.axis + 1, end=rank - 1))
        joined = op.Reshape(made, op.Concat(*shape, width, axis=0))
        last = op.Slice(joined, op.Sub(total, op.Sub(self.queries, before)), total, axis)
        result = op.Concat(op.Slice(joined, ints(0), before, axis), last, axis=self.axis)
        result.dtype, result.shape = self.dtype, ir.Shape([None] * rank)
        return result
