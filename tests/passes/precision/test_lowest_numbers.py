"""Fills that a lower precision has not become its lowest number, in every pass that lowers the precision and in emulation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sam3x.passes.base import Pass
from sam3x.passes.precision import autocast
from sam3x.passes.precision.clamp_input_masks import ClampInputMasksPass
from sam3x.passes.precision.convert_precision import ConvertPrecisionPass, lowered
from sam3x.verify.emulate import eager_in
from support.canonical import Module, capture, evaluate

LOW = torch.finfo(torch.float32).min


def filled(x: Tensor, mask: Tensor) -> Tensor:
    """The lowest float32 filled, added as a product, chosen, and as a pad."""
    scores = x.masked_fill(mask, LOW), x + mask.to(x.dtype) * LOW, torch.where(mask, LOW, x)
    padded = nn.functional.pad(x, (0, 1), value=LOW).softmax(-1)[..., :-1]
    return sum(item.softmax(-1) for item in scores) + padded  # type: ignore[return-value]


ARGS = (torch.rand(2, 5), torch.tensor([[True] * 5, [False, True, False, False, True]]))


LOWERINGS = pytest.mark.parametrize(
    ("dtype", "lowering"),
    [
        (torch.float16, ConvertPrecisionPass(torch.float16, stays=autocast.boxes, follows=lambda _: False, inputs=True)),
        (torch.float16, ConvertPrecisionPass(torch.float16)),
        (torch.bfloat16, ConvertPrecisionPass(torch.bfloat16)),
    ],
    ids=["pte", "fp16", "bf16"],
)


def assert_within_a_step(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """The distance between neighbours of the precision; a quarter to a half of it was measured."""
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found.float(), wanted, atol=step, rtol=step)


@LOWERINGS
def test_a_fill_that_overflows_is_the_lowest_of_the_precision(dtype: torch.dtype, lowering: Pass) -> None:
    program = capture(Module(filled), ARGS)
    lowering.call(program)
    program.graph_module.recompile()
    assert_within_a_step(evaluate(program, ARGS), filled(*ARGS), dtype)


class Attended(nn.Module):
    def forward(self, x: Tensor, some_mask: Tensor) -> Tensor:
        return (x + some_mask).softmax(-1)


@LOWERINGS
def test_a_mask_that_is_given_hides_with_the_lowest_of_the_precision(dtype: torch.dtype, lowering: Pass) -> None:
    """A row of the lowest float32 is what it is to eager, and −∞ beside it hides."""
    args = torch.rand(3, 4), torch.tensor([[LOW] * 4, [0.0, LOW, -torch.inf, 1.0], [LOW, -torch.inf, LOW, LOW]])
    program = capture(Attended(), args)
    clamp = ClampInputMasksPass(dtype)
    assert clamp.call(program).rewrites == 1 and not clamp.call(program).modified
    lowering.call(program)
    program.graph_module.recompile()
    assert_within_a_step(evaluate(program, args), Attended()(*args), dtype)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_emulation_clamps_fills_as_the_passes_do(precision: str, dtype: torch.dtype) -> None:
    with torch.no_grad(), eager_in(precision):
        emulated = filled(*ARGS)
    assert_within_a_step(emulated, filled(*ARGS), dtype)


def test_emulation_keeps_the_bits_of_what_overflows_and_what_is_infinite() -> None:
    x = torch.rand(2, 5) + 1
    with torch.no_grad(), eager_in("fp16"):
        large, infinite = x * 6e4 * 4, x + -torch.inf
    torch.testing.assert_close(large, x * 2.4e5, rtol=2**-10, atol=0)
    assert not torch.equal(large, x * 2.4e5) and bool(infinite.isinf().all())


def test_constants_keep_what_is_infinite_and_clamp_what_is_finite() -> None:
    value = lowered(torch.tensor([LOW, -torch.inf, torch.inf, 1e9, 1.0]), torch.float16)
    assert value.tolist() == [-65504.0, -torch.inf, torch.inf, 65504.0, 1.0]


@LOWERINGS
def test_sizes_that_are_dynamic_stay_so(dtype: torch.dtype, lowering: Pass) -> None:
    batch = torch.export.Dim("batch", min=1, max=8)
    program = capture(Module(filled), ARGS, dynamic=({0: batch}, {0: batch}))
    sizes = {node.name: value.shape for node, value in tensors(program)}
    lowering.call(program)
    for node, value in tensors(program):
        assert value.shape == sizes.get(node.name, value.shape), node


def tensors(program: torch.export.ExportedProgram) -> list[tuple[torch.fx.Node, Tensor]]:
    found = ((node, node.meta.get("val")) for node in program.graph.nodes)
    return [(node, value) for node, value in found if isinstance(value, Tensor)]
