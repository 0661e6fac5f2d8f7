"""Where a flag means all rows, additions take whole tensors, not slices of everything."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from sam3x.passes.branches.unslice_rows import UnsliceRowsPass
from support.cond_programs import COND, DYN, Program, capture, check_numbers, check_sound, cond, ops, private

torch.manual_seed(0)
C = 4
X, Y, FLAG = torch.randn(6, 5, C), torch.randn(6, 5, C), torch.tensor(True)
W = torch.randn(C, C)
SLICE = "aten.slice.Tensor"


def rows(flag: Tensor, x: Tensor, dim: int = 0) -> int:
    """A number of rows as ``dac`` decides it: half, or all."""
    vector = x.select(2, 0).select(1 - dim, 0)
    chosen = cond(flag, lambda v: v.narrow(0, 0, v.shape[0] // 2).clone(), lambda v: v.clone(), vector).shape[0]
    torch._check(chosen <= x.shape[dim])
    torch._check(chosen >= 2)
    return chosen


def attend(x: Tensor, y: Tensor, flag: Tensor, w: Tensor, dim: int = 0) -> Tensor:
    n = rows(flag, x, dim)
    head = x.narrow(dim, 0, n)
    made = linear(head + y.narrow(dim, 0, n), w)
    joined = torch.cat((head + made, x.narrow(dim, n, x.shape[dim] - n)), dim=dim)
    return joined


def twice(x: Tensor, y: Tensor, flag: Tensor, w: Tensor) -> Tensor:
    torch._check(x.shape[0] == y.shape[0])
    return attend(attend(x, y, flag, w), y, flag, w)


def once(x: Tensor, y: Tensor, flag: Tensor, w: Tensor) -> Tensor:
    torch._check(x.shape[0] == y.shape[0])
    return attend(x, y, flag, w)


def minor(x: Tensor, y: Tensor, flag: Tensor, w: Tensor) -> Tensor:
    torch._check(x.shape[1] == y.shape[1])
    return attend(x, y, flag, w, 1)


def broadcast(x: Tensor, y: Tensor, flag: Tensor, w: Tensor) -> Tensor:
    n = rows(flag, x)
    return torch.cat((x.narrow(0, 0, n) + linear(x.narrow(0, 0, n) + y[:1, :1], w), x.narrow(0, n, x.shape[0] - n)))


SIZES = {"once": {0: {0: DYN}, 1: {0: DYN}}, "twice": {0: {0: DYN}, 1: {0: DYN}}, "minor": {0: {1: DYN}, 1: {1: DYN}}}
PROGRAMS: dict[str, tuple[Callable[..., Tensor], int, int]] = {
    "once": (once, 2, 3),
    "twice": (twice, 5, 5),
    "minor": (minor, 2, 3),
    "broadcast": (broadcast, 2, 3),
}
"""Rewrites, and conditionals afterwards: the one that counts rows, and one an addition."""


def captured(name: str) -> torch.export.ExportedProgram:
    sizes = SIZES.get(name, {0: {0: DYN}})
    x = X.transpose(0, 1).contiguous() if name == "minor" else X
    y = Y.transpose(0, 1).contiguous() if name == "minor" else Y
    return capture(Program(PROGRAMS[name][0], w=W), (x, y, FLAG), sizes)


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_whole_tensors_where_it_is_all_rows(name: str) -> None:
    program = captured(name)
    before = private(program)
    result = UnsliceRowsPass().call(program)
    _, rewrites, conds = PROGRAMS[name]
    assert result.modified and result.rewrites == rewrites and ops(program, COND) == conds
    check_sound(program)
    for batch in (6, 4, 10):
        x, y = torch.randn(batch, 5, C), torch.randn(batch, 5, C)
        if name == "minor":
            x, y = x.transpose(0, 1).contiguous(), y.transpose(0, 1).contiguous()
        check_numbers(before, program, (x, y, FLAG), exact=True)
    again = UnsliceRowsPass().call(program)
    assert not again.modified and not again.rewrites


def unequal(x: Tensor, y: Tensor, flag: Tensor, w: Tensor) -> Tensor:
    """``y`` may have more rows than ``x``: a slice of it is not all of it."""
    return attend(x, y, flag, w)


def test_a_slice_that_may_cut_stays() -> None:
    program = capture(Program(unequal, w=W), (X, Y, FLAG), {0: {0: DYN}, 1: {0: DYN}})
    before = private(program)
    result = UnsliceRowsPass().call(program)
    assert result.rewrites == 1  # the join, which is all in x
    check_sound(program)
    for extra in (0, 3):
        check_numbers(before, program, (torch.randn(8, 5, C), torch.randn(8 + extra, 5, C), FLAG), exact=True)


def test_a_program_without_such_rows_is_left_alone() -> None:
    program = capture(Program(lambda x, y, f, w: torch.cat((x[:2] + linear(y[:2], w), x[2:])), w=W), (X, Y, FLAG))
    text = str(program.graph)
    result = UnsliceRowsPass().call(program)
    assert not result.modified and not result.rewrites and str(program.graph) == text
