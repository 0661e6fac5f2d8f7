"""No-ops go, bit for bit; what matters to memory, to outputs or to the last bit stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam3x.capture.program import sync_outputs
from sam3x.passes.base import PassResult, count_ops, graph_modules
from sam3x.passes.cleanup.eliminate_noops import EliminateNoopsPass
from support.canonical import Module

aten = torch.ops.aten
DYN = torch.export.Dim.DYNAMIC
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def capture(
    function: Callable[..., Any], *args: Tensor, dynamic: tuple | None = None, decompose: bool = False
) -> torch.export.ExportedProgram:
    with torch.no_grad():
        shapes = None if dynamic is None else {"args": dynamic}
        program = torch.export.export(Module(function).eval(), args, dynamic_shapes=shapes, strict=False)
        table = torch.export.default_decompositions() if decompose else {}
        return program.run_decompositions(table)


def run(program: torch.export.ExportedProgram, *args: Tensor) -> PassResult:
    """Run the pass, and check that values, signature and soundness are kept and a second run does nothing."""
    before = program.module()(*args)
    shown = str(program.graph)
    result = EliminateNoopsPass().call(program)
    sync_outputs(program)  # as the pipeline does
    for _, module in graph_modules(program):
        module.graph.lint()
        for node in module.graph.nodes:
            if node.op == "call_function" and not str(node.target).startswith("aten._assert"):
                assert "val" in node.meta, node.name
    program.validate()
    assert result.modified == (str(program.graph) != shown) or "cond" in shown
    after = program.module()(*args)
    for a, b in zip(_flat(before), _flat(after), strict=True):
        assert a.dtype is b.dtype and a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))
    again = EliminateNoopsPass().call(program)
    assert not again.modified and not again.rewrites
    return result


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


REMOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "alias": lambda x: aten.alias(x),
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "to_same_type": lambda x: aten._to_copy(x, dtype=torch.float32),
    "dropout_in_eval": lambda x: nn.functional.dropout(x, 0.5, training=False),
    "dropout_of_nothing": lambda x: aten.dropout(x, 0.0, True),
    "expand_same": lambda x: x.expand(2, 3, 4),
    "expand_minus_one": lambda x: x.expand(-1, -1, -1),
    "view_same": lambda x: x.view(2, 3, 4),
    "reshape_same": lambda x: x.reshape(2, -1, 4),
    "permute_same": lambda x: x.permute(0, 1, 2),
    "slice_all": lambda x: x[:, 0:],
    "narrow_all": lambda x: x.narrow(1, 0, 3),
    "times_one": lambda x: x * 1,
    "times_one_point_zero": lambda x: x * 1.0,
    "divided_by_one": lambda x: x / 1.0,
}


@pytest.mark.parametrize("name", REMOVED)
@pytest.mark.parametrize("decompose", [False, True])
def test_removed(name: str, decompose: bool) -> None:
    program = capture(lambda x: torch.sin(REMOVED[name](torch.cos(x))), X, decompose=decompose)
    run(program, X)
    assert count_ops(program) == {"aten.cos.default": 1, "aten.sin.default": 1}


def test_lifted_constant() -> None:
    program = capture(lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), X)
    assert run(program, X).modified
    assert count_ops(program) == {"aten.add.Tensor": 1}


def test_metadata_assertions_go() -> None:
    program = capture(lambda x: x.to(torch.float64).sum().to(torch.float32) + 1, X, decompose=True)
    assert any("_assert_tensor_metadata" in name for name in count_ops(program))
    assert run(program, X).modified
    assert not any("_assert_tensor_metadata" in name for name in count_ops(program))


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "plus_zero_changes_minus_zero": lambda x: torch.cos(x) + 0.0,
    "minus_zero_changes_nothing_but_is_arithmetic": lambda x: torch.cos(x) - 0.0,
    "times_one_to_another_type": lambda x: torch.cos(x.to(torch.int32) * 1.0),
    "times_one_broadcast": lambda x: torch.cos(x) * torch.ones(5, 1, 1, 1),
    "type_change": lambda x: torch.cos(x).double().float(),
    "layout_change": lambda x: torch.cos(x).permute(2, 0, 1).contiguous().view(-1, 3),
    "permute_of_equal_sizes": lambda x: torch.cos(x)[:, :2, :2].transpose(1, 2),
    "real_slice": lambda x: torch.cos(x)[:, 1:],
    "real_expand": lambda x: torch.cos(x)[None].expand(2, 2, 3, 4),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    program = capture(lambda x: torch.sin(KEPT[name](x)), X)
    before = count_ops(program)
    result = EliminateNoopsPass().call(program)
    checks = sum(count for key, count in before.items() if "_assert_tensor_metadata" in key)
    assert result.rewrites <= checks + sum(1 for key in before if "lift_fresh" in key)
    kept = {key: count for key, count in before.items() if "_assert_tensor" not in key and "lift_fresh" not in key}
    assert {key: count for key, count in count_ops(program).items() if key in kept} == kept


def test_minus_zero_survives() -> None:
    zero = torch.full((2, 3, 4), -0.0)
    program = capture(lambda x: torch.abs(x) * -1 + 0.0, zero)
    run(program, zero)
    assert not math.copysign(1.0, program.module()(zero)[0, 0, 0].item()) < 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clone(),
        lambda x: x.view(2, 3, 4).clone(),
        lambda x: (lambda y: (y, y.clone()))(torch.cos(x)),
        lambda x: (lambda y: (y.clone(), y.clone()))(x),
    ],
    ids=["of_input", "of_view_of_input", "of_other_output", "two_of_input"],
)
def test_outputs_stay_apart(function: Callable[..., Any]) -> None:
    """Removing the copy would make an output an input or another output."""
    program = capture(function, X)
    run(program, X)
    outputs = _flat(program.module()(X))
    pointers = [tensor.data_ptr() for tensor in (X, *outputs)]
    assert len(set(pointers)) == len(pointers)


def test_copy_that_is_the_only_output_goes() -> None:
    program = capture(lambda x: torch.cos(x).clone(), X)
    assert run(program, X).rewrites == 1
    assert count_ops(program) == {"aten.cos.default": 1}


def test_two_copies_returned_keep_one() -> None:
    program = capture(lambda x: (lambda y: (y.clone(), y.clone()))(torch.cos(x)), X)
    run(program, X)
    a, b = program.module()(X)
    assert a.data_ptr() != b.data_ptr()
    assert count_ops(program)["aten.clone.default"] == 1


def test_dynamic_sizes() -> None:
    program = capture(
        lambda x: torch.sin(torch.cos(x).view(x.shape[0], -1, 4).expand(x.shape[0], -1, -1)), X, dynamic=({0: DYN},)
    )
    assert run(program, X).rewrites == 2
    assert torch.equal(program.module()(torch.ones(5, 3, 4)), torch.sin(torch.cos(torch.ones(5, 3, 4))))


def test_slice_up_to_a_symbol_that_may_be_shorter_stays() -> None:
    x, y = torch.randn(6, 3), torch.randn(7, 3)
    program = capture(lambda x, y: torch.cos(x)[: y.shape[0] - 1], x, y, dynamic=({0: DYN}, {0: DYN}))
    EliminateNoopsPass().call(program)
    assert count_ops(program)["aten.slice.Tensor"] == 1


def test_size_assertions_stay() -> None:
    def function(x: Tensor, n: Tensor) -> Tensor:
        size = n.item()
        torch._check(size >= 1)
        torch._check(size <= 3)
        return x[:, :1].expand(2, size, 4).clone()

    program = capture(function, X, torch.tensor(2), decompose=True)
    guards = {key: count for key, count in count_ops(program).items() if "_assert_scalar" in key or "sym_constrain" in key}
    run(program, X, torch.tensor(2))
    assert guards and guards.items() <= count_ops(program).items()


def test_inside_branches() -> None:
    def function(flag: Tensor, x: Tensor) -> Tensor:
        yes = lambda x: (torch.sin(x.detach() * 1).clone() + 1,)  # noqa: E731
        return torch.ops.higher_order.cond(flag, yes, lambda x: (x.clone(),), (x,))[0]

    program = capture(function, torch.tensor(True), X)
    result = run(program, torch.tensor(True), X)
    assert result.modified and result.rewrites >= 2
    counts = count_ops(program)
    assert counts["aten.clone.default"] == 1, "the branch that only copies its input must not return the input itself"
    assert "aten.mul.Tensor" not in counts and "aten.detach.default" not in counts
    assert torch.equal(program.module()(torch.tensor(False), X), X)


def test_dead_code_goes() -> None:
    program = capture(lambda x: torch.cos(x), X)
    (cos,) = [node for node in program.graph.nodes if node.op == "call_function"]
    with program.graph.inserting_after(cos):
        dead = program.graph.call_function(aten.sin.default, (cos,))
    dead.meta["val"] = cos.meta["val"]
    result = EliminateNoopsPass().call(program)
    assert result.modified and result.rewrites == 0 and count_ops(program) == {"aten.cos.default": 1}


def test_clean_graph_is_left_alone() -> None:
    program = capture(lambda x: torch.sin(torch.cos(x)), X)
    result = run(program, X)
    assert not result.modified and not result.rewrites
