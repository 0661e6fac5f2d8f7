"""A norm that a flag applies here or there is applied once, with the weights of the branch taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from sam3x.passes.branches.fuse_alternatives import FuseAlternativesPass
from sam3x.passes.branches.if_convert import IfConvertPass
from support.cond_programs import (
    COND,
    LAYER_NORM,
    Program,
    capture,
    check_numbers,
    check_sound,
    cond,
    ops,
    private,
)

torch.manual_seed(0)
C = 4
X, FLAG = torch.randn(3, 5, C), torch.tensor(True)
WEIGHTS = {name: torch.randn(C) for name in ("a", "b", "c", "d")} | {"w": torch.randn(C, C)}


def norm_if(flag: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return cond(flag, lambda x, w, b: layer_norm(x, [C], w, b, eps), lambda x, w, b: x.clone(), x, weight, bias)


def post_then_pre(x: Tensor, p: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, w: Tensor) -> Tensor:
    """What stands between two sub-layers: post-norm of one, pre-norm of the next, and the residual around it."""
    t = norm_if(torch.logical_not(p), x * 2, a, b)
    y = norm_if(p, t, c, d)
    return t + linear(y, w)


def pre_then_post(x: Tensor, p: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, w: Tensor) -> Tensor:
    t = norm_if(p, x * 2, a, b)
    y = norm_if(torch.logical_not(p), t, c, d)
    return linear(y, w) + t


def no_residual(x: Tensor, p: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, w: Tensor) -> Tensor:
    return linear(norm_if(p, norm_if(torch.logical_not(p), x * 2, a, b), c, d), w)


def two_readers(x: Tensor, p: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, w: Tensor) -> Tensor:
    t = norm_if(torch.logical_not(p), x * 2, a, b)
    return linear(norm_if(p, t, c, d), w) + t + t.relu()


def chain(x: Tensor, p: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, w: Tensor) -> Tensor:
    return post_then_pre(post_then_pre(x, p, a, b, c, d, w), p, c, d, a, b, w)


FUSED: dict[str, tuple[Callable[..., Tensor], int]] = {
    "post then pre": (post_then_pre, 1),
    "pre then post": (pre_then_post, 1),
    "no residual": (no_residual, 1),
    "two readers": (two_readers, 1),
    "a chain": (chain, 2),
}


@pytest.mark.parametrize("select", [False, True], ids=["cond", "select"])
@pytest.mark.parametrize("name", list(FUSED))
def test_two_optional_norms_become_one(name: str, select: bool) -> None:
    function, pairs = FUSED[name]
    program = capture(Program(function, **WEIGHTS), (X, FLAG))
    if select:
        IfConvertPass().call(program)
    before = private(program)
    result = FuseAlternativesPass().call(program)
    assert result.modified and result.rewrites == pairs and not result.match_failures
    assert ops(before, LAYER_NORM) == 2 * pairs and ops(program, LAYER_NORM) == pairs
    assert ops(program, COND) <= ops(before, COND) // 2
    check_sound(program)
    check_numbers(before, program, (X, FLAG), exact=True)
    again = FuseAlternativesPass().call(program)
    assert not again.modified and not again.rewrites


def test_no_branch_passes_a_tensor_on_where_a_residual_follows() -> None:
    program = capture(Program(post_then_pre, **WEIGHTS), (X, FLAG))
    FuseAlternativesPass().call(program)
    assert ops(program, COND) == 1 and ops(program, "aten.clone.default") == 0 and ops(program, "aten.add.Tensor") == 2


def other_epsilon(x: Tensor, p: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, w: Tensor) -> Tensor:
    t = norm_if(torch.logical_not(p), x * 2, a, b, 1e-5)
    return t + linear(norm_if(p, t, c, d, 1e-6), w)


def late_weights(x: Tensor, p: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, w: Tensor) -> Tensor:
    t = norm_if(torch.logical_not(p), x * 2, a, b)
    return t + linear(norm_if(p, t, t.sum((0, 1)), d), w)


@pytest.mark.parametrize(("function", "reason"), [(other_epsilon, "differ"), (late_weights, "not known where")])
def test_what_is_refused_says_why(function: Callable[..., Tensor], reason: str) -> None:
    program = capture(Program(function, **WEIGHTS), (X, FLAG))
    text = str(program.graph)
    result = FuseAlternativesPass().call(program)
    assert not result.modified and str(program.graph) == text
    assert reason in result.match_failures[0].reason


def same_way(x: Tensor, p: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, w: Tensor) -> Tensor:
    t = norm_if(p, x * 2, a, b)
    return t + linear(norm_if(p, t, c, d), w)


def other_flags(x: Tensor, p: Tensor, q: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, w: Tensor) -> Tensor:
    t = norm_if(torch.logical_not(p), x * 2, a, b)
    return t + linear(norm_if(q, t, c, d), w)


@pytest.mark.parametrize(("function", "flags"), [(same_way, 1), (other_flags, 2)])
def test_norms_that_are_no_alternatives_stay(function: Callable[..., Any], flags: int) -> None:
    program = capture(Program(function, **WEIGHTS), (X, *[torch.tensor(True) for _ in range(flags)]))
    result = FuseAlternativesPass().call(program)
    assert not result.modified and not result.match_failures and ops(program, LAYER_NORM) == 2


def test_a_wrong_rewrite_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from sam3x.passes.branches import fuse_alternatives

    swapped = fuse_alternatives._optional

    def wrong(module: Any, node: Any) -> Any:
        found = swapped(module, node)
        return None if found is None else fuse_alternatives._Optional(
            found.value, found.predicate, not found.when, found.x, found.norm, found.arguments
        )  # fmt: skip

    program = capture(Program(post_then_pre, **WEIGHTS), (X, FLAG))
    before = private(program)
    monkeypatch.setattr(fuse_alternatives, "_optional", wrong)
    FuseAlternativesPass().call(program)
    with pytest.raises(AssertionError):
        check_numbers(before, program, (X, FLAG), exact=True)
