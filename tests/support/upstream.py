"""Meta's own encoder with distinct weights, and its layers run as Meta runs them."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sam3x.artifact.artifact import Artifact
from sam3x.capture.samples import Sizes, make_inputs, samples_for, trace_sizes
from sam3x.fusion.config import FusionConfig
from sam3x.fusion.encoder import FusionEncoder
from sam3x.fusion.shadow import shadow_of
from sam3x.fusion.wide import wide_floats
from sam3x.precision.weights import rounded_weights, swapped
from sam3x.sources.encoder import build_encoder, draw_weights
from sam3x.spec import ExportSpec, make_spec

BRANCHES = tuple(itertools.product((False, True), (False, True)))
"""Values of dac and pre-norm."""


def encoder_of(num_layers: int = 1, *, seed: int = 3, peaked: float = 1.0, **config: Any) -> nn.Module:
    """A ``TransformerEncoderFusion`` of width 32; ``peaked`` multiplies the attention scores."""
    values = {"d_model": 32, "num_heads": 4, "dim_feedforward": 64, "num_layers": num_layers, **config}
    encoder = build_encoder(FusionConfig(**values)).eval()
    draw_weights(encoder, seed=seed)
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, nn.MultiheadAttention) and peaked != 1.0:
                width = module.embed_dim
                module.in_proj_weight[:width] *= peaked
    return encoder


def rounded_encoder(module: nn.Module, spec: ExportSpec, precision: str) -> nn.Module:
    """A second tree over ``module``'s tensors, but for the weights that an artifact of ``precision`` holds rounded."""
    encoder = FusionEncoder(module, spec)
    count = len(encoder.layers)
    sizes = [trace_sizes(spec)]
    (sample, *_) = samples_for(encoder.input_names, encoder.flag_names, spec, encoder.d_model, count, sizes)
    weights = rounded_weights((encoder,), precision, lambda: encoder.eager(sample.inputs))
    shadow = shadow_of(module)
    swap = shadow.__dict__["swap"] = swapped((shadow,), weights)  # for as long as it lives
    swap.__enter__()
    return shadow


def run_layers(
    layers: Sequence[nn.Module],
    inputs: Mapping[str, Tensor],
    *,
    dac: bool,
    pre_norm: bool | Sequence[bool] | None,
    dac_dim: int = 0,
) -> Tensor:
    """The documented definition: upstream's ``forward_pre`` and ``forward_post``, with what dac needs sliced as ``tgt`` is.

    Upstream itself runs wherever it can; only pre-norm with dac is spelt out, statement by statement as upstream has it.
    """
    given = {name: value for name, value in inputs.items() if name not in ("dac", "pre_norm")}
    tgt, memory = given.pop("tgt"), given.pop("memory")
    dtype = tgt.dtype
    with torch.no_grad(), wide_floats() if dtype is torch.float64 else contextlib.nullcontext():
        for index, layer in enumerate(layers):
            layer = copy.deepcopy(layer)
            if dtype is torch.float64:
                layer.double()  # where to(float64) would take the imaginary parts from complex tables
            for module in layer.modules():
                if isinstance(module, nn.MultiheadAttention):
                    module.batch_first = True  # inputs are; the numbers are the same
            pre = layer.pre_norm if pre_norm is None else pre_norm[index] if isinstance(pre_norm, Sequence) else pre_norm
            layer.pre_norm = pre
            if dac and pre:
                tgt = _dac_pre(layer, tgt, memory, dac_dim, given)
            else:
                tgt = layer(tgt, memory, **{**dict.fromkeys(_POSITIONS), **_positions(layer, given, tgt, memory)}, dac=dac)
    return tgt


_POSITIONS = ("tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "pos", "query_pos")


def _positions(layer: nn.Module, given: dict[str, Tensor], tgt: Tensor, memory: Tensor) -> dict[str, Tensor]:
    """Upstream adds ``None`` where a flag asks for an encoding that is not there; the definition adds nothing."""
    filled = dict(given)
    filled.setdefault("query_pos", torch.zeros_like(tgt))
    filled.setdefault("pos", torch.zeros_like(memory))
    return filled


def _dac_pre(layer: Any, tgt: Tensor, memory: Tensor, dim: int, given: dict[str, Tensor]) -> Tensor:
    half = tgt.shape[dim] // 2
    first, other = tgt.narrow(dim, 0, half), tgt.narrow(dim, half, half)
    query_pos, mask, padding = given.get("query_pos"), given.get("tgt_mask"), given.get("tgt_key_padding_mask")
    if mask is not None and dim == 1:
        mask = mask[:half, :half]
    if padding is not None:
        padding = padding.narrow(dim, 0, half)
    y = layer.norm1(first)
    q = y + query_pos.narrow(dim, 0, half) if layer.pos_enc_at_attn and query_pos is not None else y
    first = first + layer.self_attn(q, q, value=y, attn_mask=mask, key_padding_mask=padding)[0]
    tgt = torch.cat((first, other), dim=dim)
    y = layer.norm2(tgt)
    query = y + query_pos if layer.pos_enc_at_cross_attn_queries and query_pos is not None else y
    pos = given.get("pos")
    key = memory + pos if layer.pos_enc_at_cross_attn_keys and pos is not None else memory
    masks = {"attn_mask": given.get("memory_mask"), "key_padding_mask": given.get("memory_key_padding_mask")}
    tgt = tgt + layer.cross_attn_image(query=query, key=key, value=memory, **masks)[0]
    return tgt + layer.linear2(layer.activation(layer.linear1(layer.norm3(tgt))))


def double(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs with floats in float64."""
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def assert_equal_to_upstream(got: Any, layers: Sequence[nn.Module], inputs: Mapping[str, Tensor], **branch: Any) -> None:
    """2e-5 of Meta's float32, or no further from its float64 than 4 times float32 itself (peaked attention)."""
    got, expected = torch.as_tensor(got), run_layers(layers, inputs, **branch)
    assert got.shape == expected.shape
    if (got - expected).abs().max() <= 2e-5:  # false where there is NaN
        return
    exact = run_layers(layers, double(inputs), **branch)
    off, eager_off = (got.double() - exact).abs().max(), (expected.double() - exact).abs().max()
    assert off <= 4 * eager_off, f"{branch}: {off:.1e} from float64, eager {eager_off:.1e}"


def check_branches(
    artifact: Artifact, encoder: nn.Module, sizes: Sizes, branches: Sequence[tuple[bool, bool]] = BRANCHES
) -> None:
    """Run an artifact and Meta's layers in every branch of (dac, pre-norm) that these sizes allow."""
    spec = make_spec(**artifact.manifest.spec)
    names = artifact.manifest.input_names
    inputs = make_inputs(
        tuple(name for name in names if name not in ("dac", "pre_norm")), spec, encoder.layers[0].d_model, sizes, seed=7
    )
    for dac, pre_norm in branches:
        if not (dac and (sizes.batch, sizes.tokens)[spec.dac_dim] % 2):
            flags = {name: value for name, value in (("dac", dac), ("pre_norm", pre_norm)) if name in names}
            got = artifact.run({**inputs, **flags})["output"]
            assert_equal_to_upstream(got, encoder.layers, inputs, dac=dac, pre_norm=pre_norm, dac_dim=spec.dac_dim)
