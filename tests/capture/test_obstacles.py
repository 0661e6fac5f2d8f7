"""The six obstacles of the document this project answers (its table of failures), one test or more for each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import sam3x
from sam3x.capture.capture import capture
from sam3x.capture.program import run_program
from sam3x.capture.samples import Sizes, branch_values, make_inputs
from sam3x.errors import CaptureError, SpecError
from sam3x.fusion.encoder import FusionEncoder
from sam3x.passes.base import count_ops
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.spec import TOKENS_INPUTS, make_spec
from support.strategies import InputsCase
from support.upstream import assert_equal_to_upstream, encoder_of

OPTIONAL = TOKENS_INPUTS[2:]
FLAGS = ("pos_enc_at_attn", "pos_enc_at_cross_attn_queries", "pos_enc_at_cross_attn_keys")
SIZES = Sizes(batch=4, tokens=18, prompt_length=7)


def covering_pairs(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Six subsets of at most ten names: of any two, both, each alone and neither occur (Kleitman and Spencer, 1973)."""
    places = list(itertools.combinations(range(1, 6), 2))[: len(names)]
    return [tuple(name for name, place in zip(names, places, strict=True) if row in (0, *place)) for row in range(6)]


def equals_upstream(layers: Any, *sizes: Sizes, traced: bool = True, **options: Any) -> None:
    """Compare with Meta's layers, in every branch and at sizes not traced, the eager definition and, where ``traced``, the
    captured graph after the default pipeline."""
    spec = make_spec(**options)
    definition = FusionEncoder(layers, spec)
    captured = default_pipeline().run(capture(layers, spec))[0] if traced else None
    for size in sizes or (SIZES,):
        inputs = make_inputs(spec.inputs, spec, 32, size, 11)
        for _, flags in branch_values(definition.flag_names, spec, len(definition.layers)):
            pre: Any = spec.pre_norm if isinstance(spec.pre_norm, bool) else None
            if "pre_norm" in flags:
                pre = flags["pre_norm"].tolist()
            branch = {"dac": bool(flags.get("dac", spec.dac is True)), "pre_norm": pre, "dac_dim": spec.dac_dim}
            results = [definition.eager({**inputs, **flags})]
            if captured is not None:
                results.append(run_program(captured.program, {**inputs, **flags}, captured.output_names))
            for result in results:
                assert_equal_to_upstream(result["output"], getattr(layers, "layers", layers), inputs, **branch)


class PlainAttention(nn.Module):
    """Attention as people write it: heads in the batch, a mask filled in, a softmax. No ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.q(query)), split(self.k(key)), split(self.v(value))
        scores = torch.einsum("bhnd,bhsd->bhns", q * q.shape[-1] ** -0.5, k)
        if attn_mask is not None:
            scores = scores.masked_fill(attn_mask, float("-inf"))
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask[:, None, None], torch.finfo(scores.dtype).min)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), None


def with_plain_attention(num_layers: int) -> nn.Module:
    encoder = encoder_of(num_layers)
    torch.manual_seed(5)
    for layer in encoder.layers:
        layer.self_attn, layer.cross_attn_image = PlainAttention(32, 4), PlainAttention(32, 2)
    return encoder.eval()


class TestCustomAttention:
    """Obstacle: 使用标准算子, attention modules people write themselves."""

    @pytest.mark.parametrize("build", [encoder_of, with_plain_attention])
    def test_twelve_attentions_in_twelve_sdpa_nodes_out(self, build: Any) -> None:
        captured, records = default_pipeline().run(capture(build(6), make_spec(dac=False, pre_norm="module")))
        counts = count_ops(captured.program)
        assert counts["aten.scaled_dot_product_attention.default"] == 12
        assert "aten._softmax.default" not in counts
        rewrites = {record.name: record.rewrites for record in records}["canonicalize_attention"]
        assert rewrites == (12 if build is with_plain_attention else 0)

    def test_hand_written_attention_exports_and_equals_eager(self, tmp_path: Path) -> None:
        encoder = with_plain_attention(2)
        artifact = sam3x.export(
            encoder, output=tmp_path / "out", inputs="tgt,memory,tgt_mask,memory_key_padding_mask,query_pos"
        )
        spec = make_spec(**artifact.manifest.spec)
        inputs = make_inputs(spec.inputs, spec, 32, SIZES, 1)
        for dac, pre in itertools.product((False, True), (False, True)):
            got = artifact.run({**inputs, "dac": dac, "pre_norm": pre})["output"]
            assert_equal_to_upstream(got, encoder.layers, inputs, dac=dac, pre_norm=pre)


class TestPreAndPostNorm:
    """Obstacle: 固定计算图, ``pre_norm`` chosen in Python."""

    @pytest.mark.parametrize("pre_norm", ["runtime", True, False, "module", "per-layer"])
    def test_every_way_to_choose_it(self, pre_norm: Any) -> None:
        encoder = encoder_of(2)
        encoder.layers[1].pre_norm = False
        equals_upstream(encoder, pre_norm=pre_norm, dac=False if pre_norm is False else "runtime")

    def test_fixed_flags_leave_no_conditional(self) -> None:
        captured = capture(encoder_of(2), make_spec(pre_norm=True, dac=False))
        assert "cond" not in count_ops(captured.program)
        assert captured.input_names == ("tgt", "memory", "memory_key_padding_mask", "query_pos")


class TestPositionEncodingFlags:
    """Obstacle: 无条件分支, position encodings added here or there by flags."""

    @pytest.mark.parametrize("given", ["", "pos", "query_pos", "pos,query_pos"])
    def test_all_eight_combinations_in_eager(self, given: str) -> None:
        for flags in itertools.product((False, True), repeat=3):
            encoder = encoder_of(1, **dict(zip(FLAGS, flags, strict=True)))
            equals_upstream(encoder, inputs=",".join(filter(None, ("tgt,memory", given))), traced=False)

    @pytest.mark.parametrize("chosen", covering_pairs((*FLAGS, *OPTIONAL)), ids=len)
    def test_every_pair_of_flags_and_optional_inputs_in_the_graph(self, chosen: tuple[str, ...]) -> None:
        encoder = encoder_of(1, **{flag: flag in chosen for flag in FLAGS})
        equals_upstream(encoder, inputs=("tgt", "memory", *(name for name in OPTIONAL if name in chosen)))


class TestDac:
    """Obstacle: 条件循环, divide and conquer over half of the queries."""

    @pytest.mark.parametrize("dac_dim", [0, 1])
    def test_every_even_batch(self, dac_dim: int) -> None:
        sizes = [Sizes(batch=batch, tokens=20, prompt_length=3) for batch in (2, 4, 6, 8)]
        equals_upstream(encoder_of(2), *sizes, dac_dim=dac_dim, inputs=",".join(TOKENS_INPUTS))

    @pytest.mark.parametrize("attention", ["portable", "ort"])
    def test_half_of_a_mask_of_all_pairs_without_a_conditional(self, attention: str, tmp_path: Path) -> None:
        encoder = encoder_of(1)
        spec = {"dac_dim": 1, "tokens": (2, 40), "inputs": TOKENS_INPUTS, "branches": "select"}
        artifact = sam3x.export(encoder, output=tmp_path / "out", attention=attention, verify="off", **spec)
        assert "If" not in {node.op_type for node in onnx.load(artifact.path).graph.node}
        for tokens, hidden, dac, pre in itertools.product((2, 18), ("some", "all"), (False, True), (False, True)):
            inputs = InputsCase(batch=3, tokens=tokens, hidden=hidden).make(TOKENS_INPUTS, 32, "bool", ())
            got = artifact.run({**inputs, "dac": dac, "pre_norm": pre})["output"]
            assert_equal_to_upstream(got, encoder.layers, inputs, dac=dac, pre_norm=pre, dac_dim=1)

    def test_the_definition_is_upstream_itself_where_upstream_runs(self) -> None:
        encoder = encoder_of(2, pos_enc_at_attn=False)
        inputs = make_inputs(("tgt", "memory", "memory_key_padding_mask"), make_spec(), 32, SIZES, 0)
        expected, mask = inputs["tgt"], inputs["memory_key_padding_mask"]
        with torch.no_grad():
            for layer in encoder.layers:
                expected = layer(expected, inputs["memory"], dac=True, memory_key_padding_mask=mask)
        assert_equal_to_upstream(expected, encoder.layers, inputs, dac=True, pre_norm=True)

    def test_an_odd_fixed_batch_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match="odd size 3"):
            sam3x.export(encoder_of(1), output=tmp_path / "out", dac=True, batch=3)
        assert not (tmp_path / "out").exists()


class TestOptionalParameters:
    """Obstacle: 简单参数, seven optional tensors, any subset of them (in the graph, with the flags above)."""

    def test_every_subset_in_eager(self) -> None:
        encoder = encoder_of(1, pos_enc_at_cross_attn_queries=True, pos_enc_at_cross_attn_keys=True)
        for given in itertools.product((False, True), repeat=len(OPTIONAL)):
            equals_upstream(encoder, inputs=("tgt", "memory", *itertools.compress(OPTIONAL, given)), traced=False)

    def test_float_masks(self) -> None:
        equals_upstream(encoder_of(1), inputs=("tgt", "memory", "tgt_mask", "memory_mask"), mask_dtype="float32")

    def test_all_at_once_in_onnx(self, tmp_path: Path) -> None:
        encoder = encoder_of(2, pos_enc_at_cross_attn_queries=True, pos_enc_at_cross_attn_keys=True)
        artifact = sam3x.export(encoder, output=tmp_path / "out", inputs=TOKENS_INPUTS)
        spec = make_spec(**artifact.manifest.spec)
        inputs = make_inputs(spec.inputs, spec, 32, SIZES, 1)
        for dac, pre in itertools.product((False, True), (False, True)):
            got = artifact.run({**inputs, "dac": dac, "pre_norm": pre})["output"]
            assert_equal_to_upstream(got, encoder.layers, inputs, dac=dac, pre_norm=pre)


def odd_one_out(encoder: nn.Module) -> type[nn.Module]:
    """A subclass of upstream's layer that does something else in layer 1."""

    class SkipsInLayerOne(type(encoder.layers[0])):  # type: ignore[misc]
        def forward(self, tgt: Tensor, memory: Tensor, dac: bool = False, **kwargs: Any) -> Tensor:
            if self.layer_idx == 1:
                return tgt + self.linear2(self.activation(self.linear1(self.norm3(tgt))))
            return super().forward(tgt, memory, dac=dac, **kwargs)

    return SkipsInLayerOne


class TestLayersThatDiffer:
    """Obstacle: 顺序执行, layers that behave differently."""

    def test_pre_and_post_norm_layers_in_one_encoder(self) -> None:
        encoder = encoder_of(3)
        for index, layer in enumerate(encoder.layers):
            layer.pre_norm = index % 2 == 0
        equals_upstream(encoder, pre_norm="module")

    def test_a_subclass_that_reads_layer_idx(self, tmp_path: Path) -> None:
        encoder = encoder_of(3)
        subclass = odd_one_out(encoder)
        for layer in encoder.layers:
            layer.__class__ = subclass
        inner = FusionEncoder(encoder, make_spec())
        assert inner.stock == [True, False, True]
        artifact = sam3x.export(encoder, output=tmp_path / "out")
        inputs = make_inputs(("tgt", "memory", "memory_key_padding_mask", "query_pos"), make_spec(), 32, SIZES, 1)
        expected = inputs["tgt"]
        with torch.no_grad():
            for layer in encoder.layers:
                expected = layer(
                    expected,
                    inputs["memory"],
                    memory_key_padding_mask=inputs["memory_key_padding_mask"],
                    query_pos=inputs["query_pos"],
                )
        got = artifact.run({**inputs, "dac": False, "pre_norm": True})["output"]
        torch.testing.assert_close(torch.as_tensor(got), expected, rtol=0, atol=2e-5)
        assert any("own forward" in note for note in artifact.manifest.notes)

    def test_different_widths_heads_and_activations(self) -> None:
        first, last = encoder_of(2).layers
        equals_upstream([first, *encoder_of(1, dim_feedforward=48, num_heads=2, activation="gelu", seed=9).layers, last])

    def test_layers_that_share_weights(self) -> None:
        layer = encoder_of(1).layers[0]
        equals_upstream([layer, layer], pre_norm="module")


class TestSizesThatAreBakedIn:
    """What cannot be captured is refused in one sentence that names the dimension."""

    def test_a_module_that_fixes_the_token_count(self) -> None:
        encoder = encoder_of(1)
        layer = encoder.layers[0]

        class Fixed(type(layer)):  # type: ignore[misc]
            def forward(self, tgt: Tensor, memory: Tensor, **kwargs: Any) -> Tensor:
                return super().forward(tgt, memory, **kwargs) + torch.zeros(22, 1)

        layer.__class__ = Fixed
        with pytest.raises(CaptureError, match=r"step 2/4 capture: .*(22|tokens)"):
            capture(encoder, make_spec(dac=False))
