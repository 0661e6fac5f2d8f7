"""Random programs of cheap operators and conditionals, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from support.cond_programs import cond

X, FLAG = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(True)
OTHER = torch.tensor(True)  # an object of its own: tracing takes one tensor given twice for one input

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
