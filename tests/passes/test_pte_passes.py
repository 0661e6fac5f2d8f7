"""The passes behind the .pte: what they rewrite, what they refuse, that they say the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from sam3x.capture.capture import capture
from sam3x.capture.program import CapturedProgram
from sam3x.passes.attention.legalize_attention_for_pte import LegalizeAttentionForPtePass
from sam3x.passes.base import Pass, PassResult, count_ops
from sam3x.passes.cleanup.fold_constants import FoldConstantsPass
from sam3x.passes.decompose.legalize_norms_for_pte import LegalizeNormsForPtePass
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.passes.graph.view_layout import layout_of
from sam3x.passes.linear.canonicalize_layouts import CanonicalizeLayoutsPass
from sam3x.passes.pipeline import PassPipeline
from sam3x.spec import make_spec
from sam3x.verify.compare import check_pass
from support.upstream import encoder_of

PASSES: tuple[Callable[[], Pass], ...] = (
    CanonicalizeLayoutsPass,
    FoldConstantsPass,
    LegalizeAttentionForPtePass,
    LegalizeNormsForPtePass,
)
aten = torch.ops.aten


@pytest.fixture(scope="module")
def captured() -> CapturedProgram:
    encoder = encoder_of(2)
    return default_pipeline("select").run(capture(encoder, make_spec(tokens=36, batch=(1, 2))))[0]


@pytest.mark.parametrize("count", range(1, len(PASSES) + 1))
def test_each_pass_fires_keeps_the_numbers_and_finds_nothing_the_second_time(captured: CapturedProgram, count: int) -> None:
    passes = [make() for make in PASSES[:count]]
    result, records = PassPipeline(tuple(passes)).run(captured, check=check_pass)
    assert records[-1].modified and records[-1].rewrites > 0 and not records[-1].match_failures
    _, (again,) = PassPipeline((PASSES[count - 1](),)).run(result)
    assert not again.modified and again.rewrites == 0
    assert list(captured.program.state_dict) != list(result.program.state_dict) or count == 1  # the caller's weights stay


def test_the_legal_graph_holds_no_view_norm_or_choice_of_whole_tensors(captured: CapturedProgram) -> None:
    result, _ = PassPipeline(tuple(make() for make in (*PASSES, CanonicalizeLayoutsPass))).run(captured)
    counts = count_ops(result.program)
    gone = ("layer_norm.default", "scaled_dot_product_attention.default", "split_with_sizes.default", "expand.default")
    assert not any(f"aten.{name}" in counts for name in gone)
    assert counts["aten.bmm.default"] == 2 * 2 * 4 * 2 and counts["aten.rsqrt.default"] == 2 * 6
    big = [n for n in result.program.graph.nodes if n.target in (aten.where.self, aten.reshape.default)]
    assert all(node.meta["val"].dim() < 3 or node.meta["val"].shape[1] == 1 for node in big)


# ---- views


def program_of(module: nn.Module, *shape: int) -> ExportedProgram:
    program = torch.export.export(module, (torch.randn(shape),), dynamic_shapes=({0: Dim("b", min=2, max=9)},))
    return program.run_decompositions({})


class Views(nn.Module):
    def __init__(self, chain: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.chain(x) + 0


CHAINS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "there and back": (lambda x: x.permute(1, 0, 2).permute(1, 0, 2), True),
    "heads merged again": (lambda x: x.reshape(x.shape[0], 5, 4, 2).reshape(x.shape[0], 5, 8), True),
    "flattened": (lambda x: x.permute(1, 0, 2).reshape(-1, 8).reshape(5, -1, 8).permute(1, 0, 2), True),
    "unsqueezed": (lambda x: x.unsqueeze(1).squeeze(1), True),
    "transposed": (lambda x: x.transpose(1, 2).reshape(x.shape[0], 5, 8), False),
    "sliced": (lambda x: x[:, 1:].reshape(x.shape[0], 4, 8), False),
    "empty": (lambda x: x[:, :1][:, 0:0].reshape(x.shape[0], 0, 8), False),
    "expanded": (lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1), False),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_views_is_its_source_exactly_when_it_is(name: str) -> None:
    chain, same = CHAINS[name]
    program = program_of(Views(chain), 4, 5, 8)
    (add,) = [node for node in program.graph.nodes if node.target is aten.add.Tensor]
    layout = layout_of(add.args[0])
    assert (layout.source.op == "placeholder" and layout.same) is same


# ---- refusals


class Attend(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, **self.options)


def run_alone(module: nn.Module, pass_: Pass, *shape: int) -> tuple[PassResult, ExportedProgram]:
    table = torch.export.default_decompositions()
    for op in (aten.scaled_dot_product_attention.default, aten.layer_norm.default):
        table.pop(op, None)
    program = torch.export.export(module, (torch.randn(shape),)).run_decompositions(table)
    return pass_.call(program), program


def test_causal_attention_is_left_alone() -> None:
    result, _ = run_alone(Attend(is_causal=True), LegalizeAttentionForPtePass(), 1, 2, 4, 8)
    assert not result.modified and "causal" in result.match_failures[0].reason


def test_attention_without_projections_is_cut_by_head_all_the_same() -> None:
    result, program = run_alone(Attend(), LegalizeAttentionForPtePass(), 1, 2, 4, 8)
    assert result.rewrites == 1
    x = torch.randn(1, 2, 4, 8)
    assert torch.allclose(program.graph_module(x)[0], Attend()(x), atol=1e-6)


def hidden_pairs(*shape: int) -> torch.Tensor:
    """Numbers of which some are -inf, in the second row all."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    numbers = numbers.masked_fill(numbers > 1, float("-inf"))
    numbers[..., 1 % shape[-2], :] = float("-inf") if shape[-2] > 1 else 0.0
    return numbers


SUMS: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "pairs and keys, heads in the batch": (
        lambda a, b: (a + b).view(2, 3, 5, 5),
        (hidden_pairs(1, 5, 5), hidden_pairs(6, 1, 5)),
    ),
    "pairs of each head, and keys": (lambda a, b: a + b, (hidden_pairs(1, 3, 5, 5), hidden_pairs(2, 1, 1, 5))),
    "pairs without dimensions in front": (lambda a, b: a + b, (hidden_pairs(5, 5), hidden_pairs(2, 1, 1, 5))),
    "both are bool": (lambda a, b: (a > -9) & (b > -9), (hidden_pairs(5, 5), hidden_pairs(2, 1, 1, 5))),
    "as large as the sum": (lambda a, b: a + b, (hidden_pairs(2, 3, 5, 5), hidden_pairs(2, 1, 1, 5))),
    "ones and zeros are added": (lambda a, b: a + (b > -9), (hidden_pairs(5, 5), hidden_pairs(2, 1, 1, 5))),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_of_masks_that_is_larger_than_each_is_never_made(name: str) -> None:
    """A row that no mask alone hides, but both together do, gets zeros, too."""
    total, (first, second) = SUMS[name]
    first[..., 2, :] = float("-inf")
    first[..., 2, 3], second[..., 3] = 0.5, float("-inf")

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("first", first)
            self.register_buffer("second", second)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=total(self.first, self.second))

    result, program = run_alone(Masked(), LegalizeAttentionForPtePass(), 2, 3, 5, 8)
    x = torch.randn(2, 3, 5, 8)
    module = program.graph_module
    given = [first, second][: len(program.graph_signature.buffers)]
    assert result.rewrites == 1
    assert torch.allclose(module(*given, x)[0], Masked()(x).nan_to_num(0.0), atol=1e-6)
    kept = name in ("as large as the sum", "ones and zeros are added")
    sums = module.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    assert kept is any(node.meta["val"].dim() == 4 for node in sums)
    assert not any(node.target is aten.bitwise_and.Tensor for node in module.graph.nodes)


def test_a_norm_over_two_dimensions_is_left_alone() -> None:
    class Norm(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.layer_norm(x, (4, 8))

    result, _ = run_alone(Norm(), LegalizeNormsForPtePass(), 2, 4, 8)
    assert not result.modified and "last dimension alone" in result.match_failures[0].reason
