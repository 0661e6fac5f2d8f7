"""One pass over one function, and everything that it must keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sam3x.capture.program import sync_outputs
from sam3x.passes.base import Pass, PassResult
from support.canonical import Module


def ran(
    graph_pass: Pass, function: Callable[..., Any], *args: Tensor, near: float = 0.0
) -> tuple[torch.export.ExportedProgram, PassResult]:
    """Run the pass over ``function`` with a dynamic first dimension; at two batches the values are what they were.

    Args:
        near: how far they may be.
    """
    with torch.no_grad():
        dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in args)
        program = torch.export.export(Module(function).eval(), args, dynamic_shapes={"args": dynamic}, strict=False)
        program = program.run_decompositions({})
    batches = [args, tuple(torch.cat((value, -value)) for value in args)]
    before = [program.module()(*given) for given in batches]
    shown = str(program.graph)
    result = graph_pass.call(program)
    sync_outputs(program)  # as the pipeline does after a pass
    program.graph_module.graph.lint()
    program.graph_module.recompile()
    program.validate()
    assert result.modified == bool(result.rewrites) == (str(program.graph) != shown)
    for given, expected in zip(batches, before, strict=True):
        got = program.module()(*given)
        assert got.shape == expected.shape and got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, atol=near, rtol=0)
    assert not graph_pass.call(program).modified
    return program, result
