"""Masks that cannot hold −∞ need no repair of rows that hide every key."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sam3x.passes.attention.decompose_attention import DecomposeAttentionPass
from sam3x.passes.attention.guard import is_finite, read_sdpa
from sam3x.passes.attention.tile_attention import TileAttentionPass
from sam3x.passes.base import Pass

aten = torch.ops.aten


class Biased(nn.Module):
    """Attention (2, 4, 5, 8) under a bias that ``make`` computes from boxes (2, 5, 4), through a layer of 4 heads."""

    def __init__(self, make: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.make = make

    def forward(self, query: Tensor, boxes: Tensor) -> Tensor:
        bias = self.embed(torch.sign(boxes) * torch.log2(boxes.abs() + 1))[:, None] + self.embed(boxes)[:, :, None]
        return functional.scaled_dot_product_attention(query, query, query, self.make(bias.permute(0, 3, 1, 2), boxes))


FINITE = {
    "computed": lambda bias, boxes: bias,
    "a row of zeros before it": lambda bias, boxes: torch.cat([torch.zeros_like(bias[:, :, :1]), bias[:, :, 1:]], dim=2),
    "scaled, shifted, bounded": lambda bias, boxes: (bias * 2 - 1).relu() + boxes[:, None, :, :1].sigmoid(),
    "one of two": lambda bias, boxes: torch.where(boxes[:, None, :, :1] > 0, bias, bias.new_zeros(())),
}
HIDING = {
    "filled": lambda bias, boxes: bias.masked_fill(boxes[:, None, :, :1] > 0, float("-inf")),
    "an input": lambda bias, boxes: bias + boxes[:, None, :, :1],
    "times infinity": lambda bias, boxes: bias * float("inf"),
    "a logarithm": lambda bias, boxes: torch.log(bias.relu()),
    "all": lambda bias, boxes: torch.full_like(bias, float("-inf")),
}


def exported(make: Callable[[Tensor, Tensor], Tensor]) -> tuple[torch.export.ExportedProgram, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    given = torch.randn(2, 4, 5, 8), torch.randn(2, 5, 4)
    table = torch.export.default_decompositions()
    for kept in (aten.linear.default, aten.scaled_dot_product_attention.default):
        table.pop(kept)
    return torch.export.export(Biased(make).eval(), given).run_decompositions(table), given


@pytest.mark.parametrize("name", [*FINITE, *HIDING])
def test_told_by_how_it_is_computed(name: str) -> None:
    program, _ = exported({**FINITE, **HIDING}[name])
    (node,) = program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    mask = read_sdpa(node).mask
    assert mask is not None and is_finite(mask) is (name in FINITE)


@pytest.mark.parametrize("lowering", [DecomposeAttentionPass(), TileAttentionPass(1)], ids=lambda item: item.name)
@pytest.mark.parametrize("name", [*FINITE, "filled", "all"])
def test_only_masks_that_may_hide_a_row_are_repaired(name: str, lowering: Pass) -> None:
    program, given = exported({**FINITE, **HIDING}[name])
    expected = program.module()(*given)
    lowering.call(program)
    repairs = [node for node in program.graph.nodes if node.target in (aten.any.dim, aten.logical_not.default)]
    assert bool(repairs) is (name not in FINITE)
    torch.testing.assert_close(program.module()(*given), expected)
