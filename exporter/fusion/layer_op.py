"""``sam3x::fusion_layer``: one operator that stands for a whole fusion layer while the encoder around it is traced.

Tracing one ``torch.cond`` costs about 0.4 s, and six layers are alike: the encoder is traced with this operator in place of
each layer, each *kind* of layer once on its own (``layer_template``), and ``inline`` puts copies of that graph where the
operator stood.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_library = torch.library.Library("sam3x", "DEF")
_library.define("fusion_layer(Tensor[] inputs, Tensor[] weights, int index) -> Tensor")

LAYER_OP = torch.ops.sam3x.fusion_layer.default


@torch.library.impl(_library, "fusion_layer", "Meta")
def _same_as_tgt(inputs: Sequence[Tensor], weights: Sequence[Tensor], index: int) -> Tensor:
    """A fusion layer maps ``tgt`` (B, N, C), its first input, to the same shape and dtype."""
    return inputs[0].new_empty(inputs[0].shape)
