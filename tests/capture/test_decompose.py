"""Core ATen node by node gives what torch's own decomposition of the whole program gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sam3x.capture import decompose
from sam3x.capture.decompose import KEPT_WHOLE, core_decompositions, decomposed

STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "copy": lambda x, _: x.clone(),
    "halves": lambda x, _: torch.cat(x.chunk(2, -1)[::-1], -1),
    "transposed twice": lambda x, _: x.transpose(0, 1).contiguous().transpose(0, 1),
    "flat": lambda x, _: x.flatten().unflatten(0, (-1, 4)),
    "scaled in place": lambda x, _: x.mul_(0.5),
    "hidden in place": lambda x, y: x.masked_fill_(y > 0, 0.25),
    "a row written": lambda x, y: _written(x, y),
    "columns written": lambda x, y: _columns(x.clone(), y),
    "columns added to": lambda x, y: _added_to(x.clone(), y),
    "a view that is read later": lambda x, y: x[:, 1:2] + _written(x, y),
    "a view that was read before": lambda x, y: x[:, 1:2].clone() + _written(x, y),
    "a view kept over a write": lambda x, y: _kept(x, y),
    "no autocast": lambda x, y: _without_autocast(x, y),
    "a row, in place": lambda x, _: x[1:2].add_(1).expand(x.shape) + x,
    "zeros filled": lambda x, y: x + torch.zeros_like(x).masked_fill_(y > 0, -3.0),
    "a convolution, in place": lambda x, _: nn.functional.conv1d(x[:, None], torch.ones(4, 1, 1)).relu_().sum(1),
    "hidden by another value, in place": lambda x, y: x.masked_fill_(y > 0, 0.5),
    "a column hides, in place": lambda x, y: x.masked_fill_(y[:, :1] > 0, 0.25),
    "dropout that is off, in place": lambda x, _: nn.functional.dropout(x, training=False).add_(2),
}


def _written(x: Tensor, y: Tensor) -> Tensor:
    x[:1] = y[:1]
    return x


def _columns(x: Tensor, y: Tensor) -> Tensor:
    x[:, 0] = x[:, 0] / 2
    x[:, 1:3] = y[:, :2]
    x[1:, 3].mul_(3)
    return x


def _added_to(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:3] += y[:, :2]
    return x


def _kept(x: Tensor, y: Tensor) -> Tensor:
    view = x[1:2]
    x[1:2, :2] = y[:1, :2]
    return x + view


def _without_autocast(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        left, right = x.chunk(2, -1)
    return torch.cat([right * y[:, :2], left], -1)


class Straight(nn.Module):
    """Runs steps one after the other; each reads one earlier value, and all of them are read again at the end."""

    def __init__(self, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        values = [x * 1.5]
        for name, source in self.steps:
            values.append(STEPS[name](values[source % len(values)], y))
        return torch.stack(values).sum(0)


def exported(module: nn.Module) -> tuple[ExportedProgram, tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    inputs = torch.randn(6, 4), torch.randn(6, 4)
    dynamic = ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    return torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False), inputs


def assert_core(program: ExportedProgram) -> None:
    """Nothing writes, and nothing is left that torch would decompose."""
    program.validate()
    table = core_decompositions()
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and isinstance(node.meta.get("val"), Tensor):
            assert not node.target._schema.is_mutable, node.target
            assert node.target in KEPT_WHOLE or not (node.target in table or node.target._can_decompose()), node.target


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9)), min_size=1, max_size=5))
def test_any_steps_give_what_they_give_in_eager(steps: list[tuple[str, int]]) -> None:
    module = Straight(steps)
    with torch.no_grad():
        program, _ = exported(module)
        program = decomposed(program)
        assert_core(program)
        for rows in (6, 9):
            given = torch.randn(rows, 4), torch.randn(rows, 4)
            assert torch.equal(program.module()(*copy.deepcopy(given)), module(*copy.deepcopy(given)))


@pytest.mark.parametrize(
    "step",
    [
        *("add", "halves", "scaled in place", "hidden in place", "zeros filled", "columns written", "no autocast"),
        "a convolution, in place",
    ],
)
def test_the_whole_program_is_not_traced_again_where_nodes_change_by_themselves(step: str) -> None:
    with torch.no_grad():
        program, _ = exported(Straight([(step, 0)]))
        with mock.patch.object(ExportedProgram, "run_decompositions", side_effect=AssertionError):
            decomposed(program)


class Branches(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cond(y.sum() > 0, STEPS["zeros filled"], STEPS["halves"], (x, y))


def test_branches_are_rewritten_too() -> None:
    with torch.no_grad():
        program, _ = exported(Branches())
        program = decomposed(program)
        for module in program.graph_module.modules():
            targets = [str(node.target) for node in getattr(module, "graph", torch.fx.Graph()).nodes]
            assert not {"aten.chunk.default", "aten.masked_fill_.Scalar", "aten.zeros_like.default"} & set(targets)
        for sign in (1, -1):
            given = torch.randn(9, 4), sign * torch.rand(9, 4)
            assert torch.equal(program.module()(*given), Branches()(*given))


def test_products_inside_a_composite_operator_stay_whole() -> None:
    """``aten.gru_cell`` is one operator that calls ``linear`` twice."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.cell(x, y)

    module = Recurrent().eval()
    with torch.no_grad():
        program, inputs = exported(module)
        made = decomposed(program)
        assert [str(node.target) for node in made.graph.nodes].count("aten.linear.default") == 2
        torch.testing.assert_close(made.module()(*inputs), module(*inputs))


def test_nodes_that_are_alike_are_traced_once() -> None:
    steps = [("hidden in place", 0), ("hidden by another value, in place", 1), ("a column hides, in place", 2)] * 3
    counts = []
    for chosen in (steps[:3], steps):
        with torch.no_grad(), mock.patch("sam3x.capture.decompose.make_fx", side_effect=decompose.make_fx) as traces:
            module = Straight(chosen)
            program, inputs = exported(module)
            made = decomposed(program)
            assert torch.equal(made.module()(*inputs), module(*inputs))
        counts.append(traces.call_count)
    assert counts[0] == counts[1] == 4  # of three fills and a stack


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("size", [{"size": (9, 7)}, {"scale_factor": 2.0}])
def test_a_picture_is_resized_by_one_operator(mode: str, size: dict[str, Any]) -> None:
    """torch's own decomposition leaves it; taken apart it is a gather of every pixel, for bilinear four."""

    class Resized(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            aligned = {} if mode == "nearest" else {"align_corners": False}
            return nn.functional.interpolate((x * y)[None, None], mode=mode, **size, **aligned).relu_()

    with torch.no_grad():
        program, inputs = exported(Resized())
        with mock.patch.object(ExportedProgram, "run_decompositions", side_effect=AssertionError):
            made = decomposed(program)
        targets = [str(node.target) for node in made.graph.nodes]
        assert f"aten.upsample_{mode}2d.vec" in targets and not any("index" in name for name in targets)
        assert torch.equal(made.module()(*inputs), Resized()(*inputs))


def test_a_size_is_read_at_one_place() -> None:
    with torch.no_grad():
        program, _ = exported(Straight([("halves", 0), ("flat", 1), ("columns written", 2), ("transposed twice", 3)]))
        made = decomposed(program)
    sizes = [str(node.meta["val"]) for node in made.graph.nodes if node.target is torch.ops.aten.sym_size.int]
    assert len(sizes) == len(set(sizes))


def test_the_origin_of_a_node_stays_with_it() -> None:
    with torch.no_grad():
        program, _ = exported(Straight([("halves", 0)]))
        made = decomposed(program)
    (split,) = (node for node in made.graph.nodes if node.target is torch.ops.aten.split_with_sizes.default)
    assert "values.append" in split.meta["stack_trace"]
