"""The baselines of ``sam3x bench`` in torch: Meta's own layers with the branch fixed, eager, compiled or as plain ONNX."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sam3x.fusion.encoder import d_model_of, layers_of
from sam3x.fusion.layer import OPTIONAL_INPUTS, fusion_layer, is_stock, opaque_layer
from sam3x.fusion.shadow import shadow_of
from sam3x.sources.encoder import Source, checkpoint_source, default_source, factory_source
from sam3x.spec import DEFAULT_TOKENS_INPUTS

if TYPE_CHECKING:
    import numpy as np

INPUTS = DEFAULT_TOKENS_INPUTS
"""What the baselines take, in order."""


def source_of(checkpoint: str | None, module: str | None, seed: int) -> Source:
    """As ``sam3x export`` chooses it.

    Raises:
        SourceError: it cannot be read or built.
    """
    if module is not None:
        return factory_source(module)
    return checkpoint_source(checkpoint) if checkpoint is not None else default_source(seed)


class StaticEncoder(nn.Module):
    """The layers one after the other, by their own ``forward`` with a fixed branch: (B, N, C) in and out.

    Only dac needs more than upstream has: with it a layer runs by this package's definition (``fusion_layer``).
    """

    def __init__(self, source: nn.Module, *, dac: bool, pre_norm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers_of(shadow_of(source)))
        self.dac = dac and pre_norm
        for layer in self.layers:
            layer.pre_norm = pre_norm  # type: ignore[assignment]
        self.d_model = d_model_of(list(self.layers))
        self.stock = [is_stock(layer, self.d_model) for layer in self.layers]
        self.eval()

    def forward(self, tgt: Tensor, memory: Tensor, memory_key_padding_mask: Tensor, query_pos: Tensor) -> Tensor:
        given = {"memory_key_padding_mask": memory_key_padding_mask, "query_pos": query_pos}
        optional: dict[str, Any] = {**dict.fromkeys(OPTIONAL_INPUTS), **given}
        for layer, stock in zip(self.layers, self.stock, strict=True):
            if not stock:
                tgt = opaque_layer(layer, tgt, memory, dac=self.dac, pre_norm=None, **optional)
            elif self.dac:
                tgt = fusion_layer(layer, tgt, memory, dac=True, pre_norm=True, **optional)
            else:
                tgt = layer(tgt, memory, **optional, dac=False)
        return tgt


def to_tensors(inputs: Mapping[str, np.ndarray]) -> tuple[Tensor, ...]:
    """Arrays by name → tensors in the order of ``INPUTS``."""
    return tuple(torch.from_numpy(inputs[name]) for name in INPUTS)


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of the parameters, each counted once."""
    return sum(parameter.nbytes for parameter in module.parameters())


def export_default(encoder: StaticEncoder, inputs: Mapping[str, np.ndarray], path: Path) -> float:
    """Write what ``torch.onnx.export`` makes of it with no help from this package. Returns its seconds, writing apart."""
    started = time.perf_counter()
    with torch.no_grad():
        program = torch.onnx.export(
            encoder,
            to_tensors(inputs),
            dynamo=True,
            opset_version=18,
            input_names=list(INPUTS),
            output_names=["output"],
            verbose=False,
        )
    seconds = time.perf_counter() - started
    assert program is not None  # dynamo=True returns one
    program.save(str(path), external_data=False)
    return seconds
