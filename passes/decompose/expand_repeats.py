"""Repetitions of what has one row: views instead of copies."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from sam3x.passes.base import MatchFailure, Pass, PassResult, graph_modules
from sam3x.passes.graph.cond_graph import expression

aten = torch.ops.aten


class ExpandRepeatsPass(Pass):
    """``aten.repeat`` along dimensions of size one → ``aten.expand``.

    Upstream's decoder repeats its queries for each picture (sam3/model/decoder.py). Torch-TensorRT's converter of ``repeat``
    multiplies sizes in Python, which a batch that the run decides is not.
    """

    name = "expand_repeats"

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, failures = 0, []
        for _, module in graph_modules(program):
            for node in module.graph.find_nodes(op="call_function", target=aten.repeat.default):
                source, repeats = node.args
                shape = _expanded(source, repeats)
                if shape is None:
                    failures.append(MatchFailure(node=node.name, reason="repeats more than one row"))
                    continue
                node.target, node.args = aten.expand.default, (source, shape)
                rewrites += 1
        return PassResult(rewrites=rewrites, match_failures=tuple(failures))


def _expanded(source: Node, repeats: list[int | Node]) -> list[int | Node] | None:
    """The sizes to expand to; None where a dimension of more than one row is repeated."""
    sizes = source.meta["val"].shape
    new = len(repeats) - len(sizes)
    kept = [-1 if _is(1, times) else times if _is(1, size) else None for size, times in zip(sizes, repeats[new:], strict=True)]
    return None if None in kept else [*repeats[:new], *kept]  # type: ignore[list-item]


def _is(number: int, size: object) -> bool:
    value = size.meta["val"] if isinstance(size, Node) else size
    return expression(value) == number
