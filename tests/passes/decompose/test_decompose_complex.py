"""Complex rotary embeddings as real products, and what the mask pass must leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import sam3x
from sam3x.capture.program import CapturedProgram, run_program
from sam3x.passes.attention.canonicalize_attention import CanonicalizeAttentionPass
from sam3x.passes.attention.simplify_attention_masks import SimplifyAttentionMasksPass
from sam3x.passes.base import count_ops, graph_modules
from sam3x.passes.decompose.decompose_complex import DecomposeComplexPass
from sam3x.passes.pipeline import PassPipeline
from support.attention_styles import Attention
from support.upstream import encoder_of


class Rotary(nn.Module):
    """As ``apply_rotary_enc`` in upstream's vitdet.py."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.rand(10, 4)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        table = self.freqs_cis.view(1, 1, *self.freqs_cis.shape)
        return torch.view_as_real(pairs * table).flatten(3).type_as(x)


class Magnitude(Rotary):
    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)).abs()


def captured(module: nn.Module, *inputs: Tensor, names: tuple[str, ...] = ("x",), batch: int = 0) -> CapturedProgram:
    shapes = tuple({batch: Dim.DYNAMIC} for _ in inputs)
    table = torch.export.default_decompositions()
    for op in ("linear", "scaled_dot_product_attention"):
        table.pop(getattr(torch.ops.aten, op).default, None)
    with torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=shapes).run_decompositions(table)
    return CapturedProgram(
        program=program,
        input_names=names,
        output_names=("out",),
        dim_names={},
        samples=(),
        eager=lambda given: {"out": module(*given.values())},
    )


def test_a_rotary_embedding_becomes_real_to_the_bit() -> None:
    module = Rotary()
    before = captured(module, torch.rand(3, 2, 10, 8))
    after, (record,) = PassPipeline((DecomposeComplexPass(),)).run(before)
    assert record.modified and record.rewrites >= 3 and not record.match_failures
    values = [node.meta["val"] for node in after.program.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert not any(value.is_complex() for value in values)
    assert not any(value.is_complex() for value in after.program.state_dict.values())
    assert before.program.state_dict["freqs_cis"].is_complex()  # the program it came from is as it was
    x = torch.rand(5, 2, 10, 8)
    assert torch.equal(run_program(after.program, {"x": x}, ("out",))["out"], module(x))
    _, (again,) = PassPipeline((DecomposeComplexPass(),)).run(after)
    assert not again.modified


class Forms(nn.Module):
    """A table as a view of a sliced buffer, one made by ``polar`` and one by ``complex`` as it runs, sums and real factors."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.rand(12, 4, 2))
        self.register_buffer("angles", torch.rand(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        sliced = torch.view_as_complex(self.table[: x.shape[2]])
        made = torch.polar(torch.ones_like(self.angles), self.angles) + torch.complex(self.angles, self.angles)
        return torch.view_as_real(pairs * sliced * self.angles - 2.0 * (pairs * made)).flatten(3)


def test_rotary_tables_made_in_the_graph_become_real() -> None:
    module = Forms()
    before = captured(module, torch.rand(3, 2, 10, 8))
    after, (record,) = PassPipeline((DecomposeComplexPass(),)).run(before)
    assert record.modified and not record.match_failures
    values = [node.meta["val"] for node in after.program.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert not any(value.is_complex() for value in values)
    x = torch.rand(5, 2, 10, 8)
    torch.testing.assert_close(run_program(after.program, {"x": x}, ("out",))["out"], module(x), atol=1e-6, rtol=0)


class Chosen(Rotary):
    """A conditional that takes a complex table and gives a complex number, around another one."""

    def forward(self, x: Tensor, turned: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        twice = torch.cond(
            turned,
            lambda a, b, t: torch.cond(t, lambda a, b: a * b, lambda a, b: a + b, (a, b)),
            lambda a, b, t: a.clone(),
            (pairs * self.freqs_cis, self.freqs_cis, turned),
        )
        return torch.view_as_real(twice * self.freqs_cis).flatten(3)


def test_conditionals_take_and_give_pairs() -> None:
    module = Chosen()
    before = captured(module, torch.rand(3, 2, 10, 8), torch.tensor(True), names=("x", "turned"))
    after, (record,) = PassPipeline((DecomposeComplexPass(),)).run(before)
    assert record.modified and not record.match_failures
    for _, graph in graph_modules(after.program):
        values = [node.meta["val"] for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        assert not any(value.is_complex() for value in values)
    x = torch.rand(3, 2, 10, 8)
    for turned in (torch.tensor(True), torch.tensor(False)):
        got = run_program(after.program, {"x": x, "turned": turned}, ("out",))["out"]
        torch.testing.assert_close(got, module(x, turned), atol=1e-6, rtol=0)


class Rotated(Attention):
    """Queries turned by a slice of a buffer seen as complex, keys by what ``polar`` makes."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__(d_model, num_heads)
        angles = torch.rand(24, self.head_dim // 2)
        self.register_buffer("angles", angles)
        self.register_buffer("table", torch.stack((angles.cos(), angles.sin()), -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        angles = self.angles[: k.shape[-2]]
        q = turned_by(q, torch.view_as_complex(self.table[: q.shape[-2]]))
        k = turned_by(k, torch.polar(torch.ones_like(angles), angles))
        scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
        return (scores if hide is None else scores.masked_fill(hide, -1e9)).softmax(-1) @ v


def turned_by(x: Tensor, table: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * table).flatten(3)


@pytest.mark.long
def test_a_rotary_encoder_with_runtime_flags_is_a_pte(tmp_path: Path) -> None:
    encoder = encoder_of(1)
    encoder.layers[0].self_attn = Rotated(32, 4)
    sizes: dict[str, Any] = {"tokens": 18, "batch": (1, 2), "prompt_length": 3}
    manifest = sam3x.export(encoder, target="pte", output=tmp_path / "out", **sizes).manifest
    assert manifest.verified and {record.branch.partition(" ")[0] for record in manifest.verification} == {
        "dac=False",
        "dac=True",
    }


def test_a_complex_operator_that_is_not_known_leaves_the_graph_as_it_is() -> None:
    before = captured(Magnitude(), torch.rand(3, 2, 10, 8))
    after, (record,) = PassPipeline((DecomposeComplexPass(),)).run(before)
    assert not record.modified and "abs" in record.match_failures[0].reason
    assert count_ops(after.program) == count_ops(before.program)


class SequenceFirst(nn.Module):
    """Attention whose batch and heads are one dimension, (1, B·H, N, D), with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.attention(x, x, x, key_padding_mask=padding)[0]


def test_a_mask_of_batch_and_heads_together_keeps_its_copies() -> None:
    module = SequenceFirst().eval()
    before = captured(module, torch.rand(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool), names=("x", "padding"))
    after, _ = PassPipeline((CanonicalizeAttentionPass(), SimplifyAttentionMasksPass())).run(before)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    given = {"x": torch.rand(2, 5, 16), "padding": padding}
    torch.testing.assert_close(run_program(after.program, given, ("out",))["out"], module(*given.values()), atol=1e-6, rtol=0)
