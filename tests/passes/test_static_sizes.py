"""Sizes that tracing knows as numbers, one row repeated as a view, rows written as rows joined: bit for bit, at every size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sam3x.passes.base import count_ops
from sam3x.passes.cleanup.fold_static_sizes import FoldStaticSizesPass
from sam3x.passes.decompose.decompose_slice_scatter import DecomposeSliceScatterPass
from sam3x.passes.decompose.expand_repeats import ExpandRepeatsPass
from support.one_pass import ran

aten = torch.ops.aten
X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def shapes_of(program: torch.export.ExportedProgram) -> list[Any]:
    views = (aten.view.default, aten.reshape.default)
    return [node.args[1] for node in program.graph.nodes if node.target in views]


def test_a_view_infers_no_size_that_is_known() -> None:
    """TensorRT does not take a key for as wide as a value whose width it infers."""
    program, result = ran(FoldStaticSizesPass(), lambda x: x.reshape(x.shape[0], 4, 2, -1), X)
    (shape,) = shapes_of(program)
    assert shape[1:] == [4, 2, 3] and result.rewrites >= 1


def test_a_view_still_infers_what_only_the_run_knows() -> None:
    program, result = ran(FoldStaticSizesPass(), lambda x: x.reshape(-1, 6), X)
    assert -1 in shapes_of(program)[0] or not isinstance(shapes_of(program)[0][0], int)
    assert not result.modified


EXPANDED: dict[str, Callable[[Tensor], Tensor]] = {
    "a batch of one row": lambda x: torch.ones(2, 1, 5).repeat(1, x.shape[0], 1),
    "two dimensions": lambda x: x[:, :1].repeat(1, 3, 1),
    "a dimension in front": lambda x: x.repeat(1, 1, 1, 1),
    "several in front, one inside": lambda x: x[:, :, :1].repeat(2, 3, 1, 1, 7),
}


@pytest.mark.parametrize("name", EXPANDED)
def test_one_row_is_expanded(name: str) -> None:
    program, result = ran(ExpandRepeatsPass(), EXPANDED[name], X)
    ops = count_ops(program)
    assert result.rewrites == 1 and not result.match_failures and not ops.get("aten.repeat.default")
    assert ops["aten.expand.default"] >= 1


@pytest.mark.parametrize("times", [(1, 2, 1), (2, 1, 1)])
def test_more_than_one_row_is_repeated(times: tuple[int, ...]) -> None:
    program, result = ran(ExpandRepeatsPass(), lambda x: x.repeat(*times), X)
    assert not result.modified and count_ops(program)["aten.repeat.default"] == 1
    assert [item.reason for item in result.match_failures] == ["repeats more than one row"]


def filled(x: Tensor, rows: int) -> Tensor:
    """As ``concat_padded_sequences``: ``x`` in front of ``rows`` rows of zeros."""
    made = torch.zeros(x.shape[0] + rows, *x.shape[1:])
    made[: x.shape[0]] = x
    return made


SCATTERED: dict[str, Callable[[Tensor], Tensor]] = {
    "in front of zeros": lambda x: filled(x, 1),
    "all of it": lambda x: aten.slice_scatter(torch.zeros_like(x), x * 2, 1),
    "between rows": lambda x: aten.slice_scatter(x, x[:, 1:3] * 2, 1, 1, 3),
    "at the end": lambda x: aten.slice_scatter(x, x[:, 2:] * 2, 1, 2),
}


@pytest.mark.parametrize("name", SCATTERED)
def test_rows_written_into_a_tensor_are_joined(name: str) -> None:
    program, result = ran(DecomposeSliceScatterPass(), SCATTERED[name], X)
    ops = count_ops(program)
    assert result.modified and not result.match_failures
    assert not ops.get("aten.slice_scatter.default") and not ops.get("aten.copy.default")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: aten.slice_scatter(x, x[:, ::2] * 2, 1, 0, 4, 2), "leaves rows out"),
        (lambda x: aten.slice_scatter(x, x[:, :3] * 2, 1, -4, -1), "from the end"),
        (lambda x: aten.copy(x, x[:, :1]), "converts or repeats"),
    ],
)
def test_what_writes_rows_otherwise_is_left(function: Callable[[Tensor], Tensor], reason: str) -> None:
    _, result = ran(DecomposeSliceScatterPass(), function, X)
    assert not result.modified and [reason in item.reason for item in result.match_failures] == [True]
