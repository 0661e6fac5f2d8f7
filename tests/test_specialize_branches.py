"""Flags given a value leave a straight line: no conditional, no dead weight, no flag, the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

import sam3x.capture
from sam3x.errors import SpecError
from sam3x.passes.specialize_branches import SpecializeBranchesPass
from sam3x.spec import make_spec
from support.cond_programs import (
    COND,
    DYN,
    LINEAR,
    Program,
    capture,
    check_numbers,
    check_sound,
    cond,
    evaluate,
    named,
    ops,
    private,
)
from support.upstream import encoder_of

X, FLAG = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(True)
OTHER = torch.tensor(True)  # an object of its own: tracing takes one tensor given twice for one input


def weights(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(4, 4, generator=generator) for name in names}


def two_weights(x: Tensor, flag: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return cond(flag, lambda x, a, b: linear(x, a), lambda x, a, b: linear(x, b) + 1, x, a, b)


def nested(x: Tensor, p: Tensor, q: Tensor, a: Tensor, b: Tensor) -> Tensor:
    both = torch.logical_and(p, torch.logical_not(q))
    inner = lambda x, q, a, b: cond(q, lambda x, a: linear(x, a), lambda x, a: x * 2, x, a)  # noqa: E731
    return cond(both, lambda x, q, a, b: linear(x, b), inner, x, q, a, b)


def halved(x: Tensor, flag: Tensor) -> Tensor:
    part = cond(flag, lambda x: x[: x.shape[0] // 2].clone(), lambda x: x.clone(), x)
    return torch.relu(part) + 1


@pytest.mark.parametrize("value", [True, False])
def test_the_branch_taken_stands_inline(value: bool) -> None:
    program = capture(Program(two_weights, **weights("a", "b")), (X, FLAG))
    before, state = private(program), program.state_dict
    names = program.graph_signature.user_inputs
    pass_ = SpecializeBranchesPass({names[1]: value})
    result = pass_.call(program)
    assert result.modified and result.rewrites == 1
    assert ops(program, COND) == 0 and ops(program, LINEAR) == 1
    assert program.graph_signature.user_inputs == pass_.input_names(names) == names[:1]
    assert set(program.state_dict) == {"a" if value else "b"} == set(program.graph_signature.parameters)
    assert set(state) == {"a", "b"} and program.state_dict is not state
    check_sound(program)
    check_numbers(before, program, (X, FLAG), exact=True, fixed={names[1]: value})
    assert torch.equal(program.module()(X), evaluate(program, {names[0]: X})[0])
    again = pass_.call(program)
    assert not again.modified and not again.rewrites


@pytest.mark.parametrize("values", [{"p": True}, {"p": False}, {"q": True}, {"q": False}, {"p": True, "q": False}], ids=str)
def test_nested_and_partial(values: dict[str, bool]) -> None:
    program = capture(Program(nested, **weights("a", "b")), (X, FLAG, OTHER))
    before = private(program)
    names = dict(zip("pq", program.graph_signature.user_inputs[1:], strict=True))
    fixed = {names[key]: value for key, value in values.items()}
    result = SpecializeBranchesPass(fixed).call(program)
    left = {"{'p': True}": 2, "{'p': False}": 1, "{'q': True}": 0, "{'q': False}": 1}.get(str(values), 0)
    assert result.modified and ops(program, COND) == left
    check_sound(program)
    check_numbers(before, program, (X, FLAG, OTHER), exact=True, fixed=fixed)
    used = {spec.target for spec in program.graph_signature.input_specs if spec.target}
    assert set(program.state_dict) == used
    assert not SpecializeBranchesPass(fixed).call(program).modified


def test_a_flag_that_is_data_too_becomes_a_constant() -> None:
    function = lambda x, f: (torch.where(f, x, -x), cond(f, lambda x: x + 1, lambda x: x - 1, x))  # noqa: E731
    program = capture(Program(function), (X, FLAG))
    before, name = private(program), program.graph_signature.user_inputs[1]
    SpecializeBranchesPass({name: False}).call(program)
    assert ops(program, "aten.full.default") == 1
    check_sound(program)
    check_numbers(before, program, (X, FLAG), exact=True, fixed={name: False})


@pytest.mark.parametrize("value", [True, False])
def test_a_size_that_depended_on_the_flag_is_known(value: bool) -> None:
    program = capture(Program(halved), (X, FLAG), {0: {0: DYN}})
    before, name = private(program), program.graph_signature.user_inputs[1]
    SpecializeBranchesPass({name: value}).call(program)
    check_sound(program)
    for node in program.graph.nodes:
        for size in getattr(node.meta.get("val"), "shape", ()):
            assert "u" not in str(size), node
    check_numbers(before, program, (X, FLAG), exact=True, fixed={name: value})


@pytest.mark.parametrize(("values", "fact"), [({"dac": True}, "no input 'dac'"), ({"args_0": True}, "no bool scalar")])
def test_unknown_flags(values: dict[str, bool], fact: str) -> None:
    program = capture(Program(two_weights, **weights("a", "b")), (X, FLAG))
    text = str(program.graph)
    values = {program.graph_signature.user_inputs[0] if name == "args_0" else name: value for name, value in values.items()}
    with pytest.raises(SpecError, match=fact):
        SpecializeBranchesPass(values).call(program)
    assert str(program.graph) == text


def test_the_other_value_afterwards() -> None:
    program = capture(Program(two_weights, **weights("a", "b")), (X, FLAG))
    name = program.graph_signature.user_inputs[1]
    SpecializeBranchesPass({name: True}).call(program)
    with pytest.raises(SpecError, match="already"):
        SpecializeBranchesPass({name: False}).call(program)


def test_a_wrong_rewrite_is_caught() -> None:
    program = capture(Program(two_weights, **weights("a", "b")), (X, FLAG))
    before, name = private(program), program.graph_signature.user_inputs[1]
    SpecializeBranchesPass({name: True}).call(program)
    with pytest.raises(AssertionError):
        check_numbers(before, program, (X, FLAG), exact=True, fixed={name: False})


@pytest.mark.parametrize("pre", [True, False])
def test_sam3_keeps_one_flag_at_runtime(pre: bool) -> None:
    captured = sam3x.capture.capture(encoder_of(1), make_spec())
    program = private(captured.program)
    result = SpecializeBranchesPass({"pre_norm": pre}).call(program)
    assert result.rewrites == (6 if pre else 7) and ops(program, COND) == (1 if pre else 0)
    check_sound(program)
    for sample in captured.samples:
        if bool(sample.inputs["pre_norm"]) is pre:
            assert torch.equal(evaluate(captured.program, sample.inputs)[0], evaluate(program, sample.inputs)[0])


OPS: list[Any] = [
    torch.relu,
    torch.tanh,
    lambda x: x * 2,
    lambda x: x + 1,
    lambda x: torch.softmax(x, -1),
    lambda x: x.flip(-1),
]


@st.composite
def trees(draw: st.DrawFn, depth: int = 2) -> Any:
    """A chain of cheap operators, or a conditional on flag 0 or 1 between two of them."""
    chain = draw(st.lists(st.sampled_from(range(len(OPS))), min_size=1, max_size=3))
    if depth == 0 or draw(st.booleans()):
        return chain, None
    return chain, (draw(st.sampled_from([0, 1])), draw(trees(depth=depth - 1)), draw(trees(depth=depth - 1)))


def run_tree(tree: Any, x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    chain, branch = tree
    for index in chain:
        x = OPS[index](x)
    if branch is None:
        return x
    which, true, false = branch
    return cond((p, q)[which], lambda *a: run_tree(true, *a), lambda *a: run_tree(false, *a), x, p, q)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tree=trees(), p=st.sampled_from([None, True, False]), q=st.booleans())
def test_random_conditionals(tree: Any, p: bool | None, q: bool) -> None:
    program = capture(Program(lambda x, p, q: run_tree(tree, x, p, q)), (X, FLAG, OTHER))
    before, names = private(program), program.graph_signature.user_inputs
    fixed = {names[2]: q} if p is None else {names[1]: p, names[2]: q}
    SpecializeBranchesPass(fixed).call(program)
    check_sound(program)
    assert p is None or not ops(program, COND)
    check_numbers(before, program, (X, FLAG, OTHER), exact=True, fixed=fixed)
    assert set(named(program, (X,) if p is not None else (X, FLAG))) == set(program.graph_signature.user_inputs)
