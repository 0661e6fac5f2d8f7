"""Packed projections as linears of their own, woven channels of q and k one after the other: upstream's rotary attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.functional import linear, scaled_dot_product_attention

from sam3x.capture.component import capture_component
from sam3x.capture.program import CapturedProgram, Sample
from sam3x.passes.attention.unweave_channels import UnweaveChannelsPass
from sam3x.passes.base import Pass, count_ops
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.passes.linear.split_linears import SplitLinearsPass
from sam3x.passes.pipeline import PassPipeline
from sam3x.sources.contract import Component, Port
from sam3x.targets.onnx.target import OnnxOptions, OnnxTarget
from support.cond_programs import check_numbers, check_sound, private

HEADS, WIDTH = 2, 16
BEFORE = default_pipeline()
Body = Callable[[nn.Module, Tensor], Tensor | tuple[Tensor, ...]]


class Packed(nn.Module):
    """(B, 6, 16) through ``body``, which has a packed projection, another linear and the table of a rotary embedding."""

    table: Tensor

    def __init__(self, body: Body, width: int = 3 * WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.qkv, self.proj = body, nn.Linear(WIDTH, width), nn.Linear(WIDTH, WIDTH)
        angles = torch.rand(6, WIDTH // HEADS // 2) * 6
        self.register_buffer("table", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made = self.body(self, x)
        return made if isinstance(made, tuple) else (made,)


def rotated(self: nn.Module, x: Tensor) -> Tensor:
    """As ``apply_rotary_enc`` in upstream's vitdet.py."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * self.table.view(1, 1, *self.table.shape)).flatten(3).type_as(x)


def heads(self: nn.Module, x: Tensor) -> list[Tensor]:
    """q, k, v (B, H, N, D) as ``Attention.forward`` there makes them."""
    return list(self.qkv(x).reshape(x.shape[0], x.shape[1], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0))


def joined(self: nn.Module, x: Tensor) -> Tensor:
    return self.proj(x.permute(0, 2, 1, 3).flatten(2))


def rotary(self: nn.Module, x: Tensor) -> Tensor:
    q, k, v = heads(self, x)
    return joined(self, scaled_dot_product_attention(rotated(self, q), rotated(self, k), v))


def query_alone(self: nn.Module, x: Tensor) -> Tensor:
    q, k, v = heads(self, x)
    return joined(self, scaled_dot_product_attention(rotated(self, q), k, v))


def read_twice(self: nn.Module, x: Tensor) -> Tensor:
    q, k, v = heads(self, x)
    q = rotated(self, q)
    return joined(self, scaled_dot_product_attention(q, rotated(self, k), v) + q)


def overlapping(self: nn.Module, x: Tensor) -> Tensor:
    made = self.qkv(x)
    return made[..., :20].relu().sum(-1) + made[..., 16:36].exp().sum(-1)


def fewer_rows(self: nn.Module, x: Tensor) -> Tensor:
    made = self.qkv(x)
    return made[:, :3, :16].relu() + made[:, 3:, 16:32].exp()


def computed_weight(self: nn.Module, x: Tensor) -> Tensor:
    made = linear(x, self.qkv.weight * x.mean())
    return made[..., :16].relu() + made[..., 16:32].exp()


def returned(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    made = self.qkv(x)
    return made[..., :16].relu(), made[..., 32:].transpose(1, 2)


def captured(body: Body, *, tokens: str | None = None, names: tuple[str, ...] = ("y",)) -> CapturedProgram:
    ports = (Port(name="x", dims=("batch", tokens, None)),)
    ranges = {"batch": (1, 8), **({"tokens": (1, 64)} if tokens else {})}
    component = Component(name="part", module=Packed(body).eval(), inputs=ports, outputs=names, ranges=ranges)
    return BEFORE.run(capture_component(component, Sample(branch="fixed", case="x", inputs={"x": torch.randn(3, 6, WIDTH)})))[0]


def rewritten(given: CapturedProgram, made: Pass) -> tuple[ExportedProgram, ExportedProgram, int]:
    """Before, after, rewrites; sound, the same numbers, and a second run finds nothing."""
    after = private(given.program)
    result = made.call(after)
    assert result.modified == (result.rewrites > 0)
    check_sound(after)
    for batch in (1, 5):
        check_numbers(given.program, after, (torch.randn(batch, 6, WIDTH),), exact=False)
    again = private(after)
    text = str(again.graph)
    assert not made.call(again).modified and str(again.graph) == text
    return given.program, after, result.rewrites


def test_queries_keys_and_values_of_a_rotary_attention_are_five_linears() -> None:
    before, after, rewrites = rewritten(captured(rotary), SplitLinearsPass(8))
    found = count_ops(after)
    assert rewrites == 1 and found["aten.linear.default"] == 5 + 1 and count_ops(before)["aten.linear.default"] == 2
    linears = after.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    sizes = [node.meta["val"].shape[-1] for node in linears]
    assert sorted(sizes) == [8, 8, 8, 8, 16, 16]
    assert all(value.shape[0] != 3 * WIDTH for value in after.state_dict.values())  # the packed weight is gone


def test_two_dynamic_sizes_and_a_part_that_is_returned() -> None:
    before, after, rewrites = rewritten(captured(returned, tokens="tokens", names=("y", "z")), SplitLinearsPass(8))
    assert rewrites == 1 and count_ops(after)["aten.linear.default"] == 2
    check_numbers(before, after, (torch.randn(2, 9, WIDTH),), exact=False)


@pytest.mark.parametrize(
    ("body", "smallest", "reason"),
    [
        (rotary, 9, "fewer than 9 features"),
        (overlapping, 8, "readers share features"),
        (fewer_rows, 8, "cuts another dimension"),
        (computed_weight, 8, "no constant"),
    ],
)
def test_a_linear_that_stays_whole_says_why(body: Body, smallest: int, reason: str) -> None:
    program = private(captured(body).program)
    text = str(program.graph)
    result = SplitLinearsPass(smallest).call(program)
    assert not result.modified and str(program.graph) == text
    assert [reason in item.reason for item in result.match_failures] == [True]


def test_woven_channels_follow_each_other() -> None:
    before, after, rewrites = rewritten(captured(rotary), UnweaveChannelsPass())
    assert rewrites == 1 and count_ops(before)["aten.cat.default"] == count_ops(after)["aten.cat.default"] == 2
    assert count_ops(before)["aten.unsqueeze.default"] >= 4 and "aten.unsqueeze.default" not in count_ops(after)


@pytest.mark.parametrize(("body", "reason"), [(query_alone, "only the query is woven"), (read_twice, "read elsewhere")])
def test_channels_that_stay_woven_say_why(body: Body, reason: str) -> None:
    program = private(captured(body).program)
    text = str(program.graph)
    result = UnweaveChannelsPass().call(program)
    assert not result.modified and str(program.graph) == text
    assert [reason in item.reason for item in result.match_failures] == [True]


def test_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SplitLinearsPass.__init__, "__defaults__", (8,))
    given = captured(rotary)
    target, options = OnnxTarget(), OnnxOptions()
    after, records = PassPipeline(target.legalization_passes(options)).run(given)
    assert {item.name: item.rewrites for item in records if item.rewrites}.keys() >= {"split_linears", "unweave_channels"}
    target.lower(after, tmp_path / "a.onnx", options)
    runner = target.load_runner(tmp_path / "a.onnx")
    for batch in (1, 4):
        x = torch.randn(batch, 6, WIDTH)
        made = torch.from_numpy(runner.run({"x": x.numpy()})["y"])
        torch.testing.assert_close(made, given.eager({"x": x})["y"], atol=2e-6, rtol=1e-5)
