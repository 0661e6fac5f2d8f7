"""Attention in a lower precision as a back end may compute it, emulated in torch.

``layer``: one operator of the back end's, which may round every step inside it. ``explicit``: two products, and a softmax in
float32 between them. Sums are float32 in both, as in ``sam3x.verify.emulate``: what a GPU's kernel sums in cannot be told here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sam3x.precision.doctor_report import AttentionForm


def emulated_attention(
    form: AttentionForm, dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Scaled dot-product attention whose operands, and steps by ``form``, are in ``dtype``.

    Args:
        query, key, value: (…, l, e), (…, s, e), (…, s, v), float32. mask: float (added) or bool (True takes part), or None.
        scale: of the scores; None: 1/√e.

    Returns:
        (…, l, v), float32. Rows that see no key are zeros, as torch's.
    """

    def low(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).float()

    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = low(low(low(query) * factor) @ low(key).transpose(-2, -1))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    if form == "explicit":
        weights = torch.softmax(scores, -1)
    else:
        shifted = low(low(scores) - low(scores).amax(-1, True))
        powers = low(shifted.exp())
        weights = powers / low(powers.sum(-1, keepdim=True))
    blind = (scores == -math.inf).all(-1, keepdim=True)
    return low(low(weights.masked_fill(blind, 0.0)) @ low(value))
