"""What coremltools does not take, as operators that it takes: the same values at every batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sam3x.passes.base import count_ops
from sam3x.passes.cleanup.canonicalize_sizes import CanonicalizeSizesPass
from sam3x.passes.decompose.decompose_group_norm import DecomposeGroupNormPass
from sam3x.passes.decompose.legalize_for_coreml import LegalizeForCoreMlPass
from sam3x.passes.decompose.lower_rank import LowerRankPass
from support.one_pass import ran

aten = torch.ops.aten
X = torch.randn(4, 6, 4, 8, generator=torch.Generator().manual_seed(0))
SCALE = torch.linspace(-1, 2, 6)


def windows(x: Tensor) -> Tensor:
    """As upstream's ``window_partition``."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().reshape(-1, 2, 2, channels)


def back(x: Tensor) -> Tensor:
    """As upstream's ``window_unpartition``, of what is windows already."""
    x = x.reshape(x.shape[0], 3, 2, 2, 2, 8)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 6, 4, 8)


PERMUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "windows": windows,
    "windows joined": back,
    "a picture of channels": lambda x: x.reshape(x.shape[0], 1, 6, 2, 2, 8).permute(0, 5, 1, 2, 3, 4).reshape(-1, 8, 24),
    "the batch inside": lambda x: x.reshape(x.shape[0], 3, 2, 4, 2, 4).permute(1, 2, 0, 3, 4, 5).reshape(6, -1, 32),
}


@pytest.mark.parametrize("name", PERMUTED)
def test_a_permute_of_six_dimensions_is_one_of_fewer(name: str) -> None:
    program, result = ran(LowerRankPass(), PERMUTED[name], X)
    assert result.rewrites == 1 and not result.match_failures
    assert max(node.meta["val"].dim() for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)) <= 5


def test_dimensions_that_all_part_are_left() -> None:
    _, result = ran(LowerRankPass(), lambda x: x.reshape(-1, 2, 3, 2, 2, 8).permute(5, 3, 1, 4, 2, 0).reshape(-1), X)
    assert not result.modified and [item.reason for item in result.match_failures] == ["6 dimensions go separate ways"]


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_group_norm_is_means(groups: int, scaled: bool) -> None:
    weight, bias = (SCALE, SCALE.flip(0)) if scaled else (None, None)

    def normed(x: Tensor) -> Tensor:
        return aten.native_group_norm(x * 3 + 9, weight, bias, x.shape[0], 6, 32, groups, 1e-3)[0]

    program, result = ran(DecomposeGroupNormPass(), normed, X, near=2e-6)
    assert result.rewrites == 1 and "aten.native_group_norm.default" not in count_ops(program)


LEGAL: dict[str, Callable[[Tensor], Tensor]] = {
    "a quotient rounded down": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "a quotient without its fraction": lambda x: torch.div(x, 0.3, rounding_mode="trunc"),
    "numbers of a range": lambda x: x + torch.div(torch.arange(8), 2, rounding_mode="floor"),
    "bools": lambda x: (x > 0) | (x < -1),
    "other bools": lambda x: torch.bitwise_xor(x > 0, x < 1),
    "rows for each of the batch": lambda x: torch.ones(1, 1, 5).expand(x.shape[0], 2, 5) * 2,
    "a dimension in front": lambda x: x[:, :1].expand(3, -1, 6, -1, -1) + 1,
    "a choice of numbers": lambda x: torch.where(x > 0, torch.tensor(0.0), torch.tensor(-torch.inf)),
    "a choice of whole numbers": lambda x: torch.where(x > 0, torch.tensor(2), torch.tensor([[3], [4], [5], [6]])),
    "a choice of bools": lambda x: torch.where(x > 0, torch.tensor(True), torch.tensor(False)),
    "as it is": lambda x: x.expand(1, -1, -1, -1, -1) + 1,
}


@pytest.mark.parametrize("name", LEGAL)
def test_operators_become_those_that_are_converted(name: str) -> None:
    program, result = ran(LegalizeForCoreMlPass(), LEGAL[name], X)
    assert result.rewrites == 1 and not result.match_failures
    gone = {"aten.expand.default", "aten.div.Tensor_mode", "aten.__or__.Tensor", "aten.bitwise_xor.Tensor"}
    assert not gone & count_ops(program).keys()


def test_a_choice_from_all_there_is_stays() -> None:
    _, result = ran(LegalizeForCoreMlPass(), lambda x: torch.where(x[:1, :1] > 0, x, torch.tensor(0.0)), X)
    assert not result.modified and not result.match_failures


@pytest.mark.parametrize("dim", [1, -2, 3])
def test_one_row_is_scattered_by_a_choice(dim: int) -> None:
    """As upstream's ``concat_padded_sequences`` puts one token behind those of each prompt."""

    def scattered(x: Tensor) -> Tensor:
        row = x.select(dim, 0).unsqueeze(dim)
        index = (row * 100).abs().long() % 3
        return x.scatter(dim, index, row * 2)

    program, result = ran(LegalizeForCoreMlPass(), scattered, X)
    assert result.rewrites == 1 and "aten.scatter.src" not in count_ops(program)


def test_more_rows_are_scattered() -> None:
    index = torch.zeros(1, 2, 4, 8, dtype=torch.long)
    _, result = ran(LegalizeForCoreMlPass(), lambda x: x.scatter(1, index, x[:1, :2] * 2), X)
    assert not result.modified and "more than one row" in result.match_failures[0].reason


def test_a_size_that_comes_out_whole_is_not_divided() -> None:
    program, result = ran(CanonicalizeSizesPass(), lambda x: x.reshape(-1, 12).reshape(x.numel() // 48, 48), X)
    assert result.rewrites >= 1 and not {"floordiv", "aten.sym_numel.default"} & {str(name) for name in count_ops(program)}
    assert not any("floordiv" in str(node.target) for node in program.graph.nodes)


def test_a_half_stays_one() -> None:
    _, result = ran(CanonicalizeSizesPass(), lambda x: x[: x.shape[0] // 2], X)
    assert not result.rewrites and "no product of sizes" in result.match_failures[0].reason
