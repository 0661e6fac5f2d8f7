"""Numbers of elements as products of sizes."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor

from sam3x.passes.base import count_ops
from sam3x.passes.decompose.decompose_numel import DecomposeNumelPass
from support.canonical import Module, evaluate

aten = torch.ops.aten
X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dynamic", [True, False])
def test_elements_are_counted_by_sizes(dynamic: bool) -> None:
    """As decomposing ``reshape(-1, …)`` leaves the size that it finds: ``numel // 48``."""
    shapes = {"args": ({0: torch.export.Dim.DYNAMIC},)} if dynamic else None
    program = torch.export.export(Module(viewed).eval(), (X,), dynamic_shapes=shapes)
    (view,) = program.graph.find_nodes(op="call_function", target=aten.view.default)
    source, size = view.args[0], view.args[0].meta["val"].shape[0]
    with program.graph.inserting_before(view):
        count = program.graph.call_function(aten.sym_numel.default, (source,))
        rows = program.graph.call_function(operator.floordiv, (count, 48))
    count.meta["val"], rows.meta["val"] = size * 48, size
    view.args = (source, [rows, 48])
    assert DecomposeNumelPass().call(program).rewrites == 1 and not DecomposeNumelPass().call(program).modified
    program.graph_module.graph.eliminate_dead_code()
    program.graph_module.recompile()
    found = count_ops(program)
    assert "aten.sym_numel.default" not in found and (str(operator.mul) in found) == dynamic
    for batch in (4, 2) if dynamic else (4,):
        torch.testing.assert_close(evaluate(program, (X[:batch],)), viewed(X[:batch]), rtol=0, atol=0)


def viewed(x: Tensor) -> Tensor:
    return x.view(x.shape[0], 48)
