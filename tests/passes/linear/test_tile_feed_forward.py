"""Feed-forward blocks a tile of rows at a time: what is taken, what is left, and the numbers in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sam3x.capture.component import capture_component
from sam3x.capture.program import CapturedProgram, Sample
from sam3x.passes.linear.tile_feed_forward import ACTIVATIONS, TILED_FEED_FORWARD, TileFeedForwardPass
from sam3x.passes.pipeline import PassPipeline
from sam3x.sources.contract import Component, Port
from sam3x.spec import checked
from sam3x.targets.onnx import loop as onnx_loop
from sam3x.targets.onnx.target import OnnxOptions, OnnxTarget
from support.cond_programs import check_numbers, check_sound, private

Activation = Callable[[Tensor], Tensor]


class Mlp(nn.Module):
    """(…, 8) → (…, 4) through 32."""

    def __init__(self, activation: Activation, *, bias: bool = True, twice: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32, bias=bias), nn.Linear(32, 4, bias=bias)
        self.activation, self.twice = activation, twice

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.first(x))
        made = self.second(hidden)
        return made + hidden[..., :4] if self.twice else made


def captured(module: nn.Module, *, rank: int = 3, dynamic: bool = True) -> torch.export.ExportedProgram:
    sizes = {index: torch.export.Dim(f"d{index}", max=4096) for index in range(rank - 1)} if dynamic else None
    example = torch.randn(*(3, 5, 7)[: rank - 1], 8)
    program = torch.export.export(module, (example,), dynamic_shapes=(sizes,))
    table = torch.export.default_decompositions()
    for kept in (torch.ops.aten.linear.default, torch.ops.aten.gelu.default, torch.ops.aten.silu.default):
        table.pop(kept, None)
    return program.run_decompositions(table)


def count(program: torch.export.ExportedProgram) -> int:
    return len(program.graph.find_nodes(op="call_function", target=TILED_FEED_FORWARD))


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_block_becomes_one_operator(name: str, bias: bool) -> None:
    program = captured(Mlp(ACTIVATIONS[name], bias=bias))
    before = private(program)
    result = TileFeedForwardPass(1000).call(program)
    assert result.modified and result.rewrites == 1 and count(program) == 1 and not result.match_failures
    check_sound(program)
    for rows in (1, 9):
        check_numbers(before, program, (torch.randn(2, rows, 8),), exact=True)
    assert not TileFeedForwardPass(1000).call(program).modified


LEFT: dict[str, tuple[nn.Module, dict[str, Any], str]] = {
    "used twice": (Mlp(functional.relu, twice=True), {}, "used elsewhere"),
    "small": (Mlp(functional.relu), {"dynamic": False}, "takes 1,920 bytes"),
    "one row": (Mlp(functional.relu), {"rank": 1}, "one row"),
    "another activation": (Mlp(lambda x: functional.relu(x) ** 2), {}, ""),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_says_why(name: str) -> None:
    module, sizes, reason = LEFT[name]
    program = captured(module, **sizes)
    text = str(program.graph)
    result = TileFeedForwardPass(1920).call(program)
    assert not result.modified and str(program.graph) == text
    assert [reason in failure.reason for failure in result.match_failures] == [True] * bool(reason)


@pytest.mark.parametrize("rank", (2, 3, 4))
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_onnx_runtime_gives_the_same(name: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 1,024 bytes, 96 rows at least: one tile, several, the last one shorter; every other case without a bias."""
    monkeypatch.setattr(onnx_loop, "TILE_BYTES", 1024)
    bias = (rank + list(ACTIVATIONS).index(name)) % 2 == 0
    module = Mlp(ACTIVATIONS[name], bias=bias)
    program = captured(module, rank=rank)
    given = CapturedProgram(
        program=program, input_names=("x",), output_names=("y",), dim_names={}, samples=(),
        eager=lambda inputs: {"y": module(**inputs)},
    )  # fmt: skip
    target, options = OnnxTarget(), checked(OnnxOptions, {})
    given, _ = PassPipeline((TileFeedForwardPass(0),)).run(given)
    path = tmp_path / "mlp.onnx"
    target.lower(given, path, options)
    assert "Loop" in {node.op_type for node in onnx.load(path).graph.node}
    runner = target.load_runner(path)
    for lead in ((1, 1, 1), (1, 4, 95), (3, 97, 2), (1, 7, 160)):
        x = torch.randn(*(lead if rank == 4 else (lead[0], lead[1] * lead[2]) if rank == 3 else (lead[1] * lead[2],)), 8)
        made = torch.from_numpy(runner.run({"x": x.numpy()})["y"])
        torch.testing.assert_close(made, module(x).detach(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("rows", "even"), [((16, 12), True), ((193,), False), ((5, 19), False)])
def test_rows_of_a_known_number_are_cut_without_a_rest(
    rows: tuple[int, ...], even: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 100 rows a tile and at least 96: 192 are two tiles of each image, 193 and 95 have no such divisor."""
    monkeypatch.setattr(onnx_loop, "TILE_BYTES", 100 * 32 * 4)
    module = Mlp(functional.gelu)
    port = Port(name="x", dims=("batch", *[None] * len(rows), None))
    component = Component(name="mlp", module=_Tuple(module), inputs=(port,), outputs=("y",), ranges={"batch": (1, 4)})
    given, _ = PassPipeline((TileFeedForwardPass(0),)).run(
        capture_component(component, Sample(branch="fixed", case="x", inputs={"x": torch.randn(2, *rows, 8)}))
    )
    path, target = tmp_path / "mlp.onnx", OnnxTarget()
    target.lower(given, path, OnnxOptions())
    found = [node.op_type for node in onnx.load(path).graph.node]
    assert found.count("Loop") == 1 and ("Slice" not in found) == even
    runner = target.load_runner(path)
    for batch in (1, 3):
        x = torch.randn(batch, *rows, 8)
        made = torch.from_numpy(runner.run({"x": x.numpy()})["y"])
        torch.testing.assert_close(made, module(x).detach(), atol=2e-6, rtol=1e-5)


class _Tuple(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.module(x),)
