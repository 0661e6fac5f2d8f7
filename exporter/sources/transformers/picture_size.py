"""transformers' models for a picture of another size, as their configuration's ``image_size`` would build them."""

from __future__ import annotations

import copy
from typing import Any

from sam3x.errors import SourceError
from sam3x.sources.picture_size import check_picture_size, size_note


def resize(vision_encoder: Any, own: int, size: int, tracker: Any = None) -> str:
    """Give the ViT of a private tree the rotary positions that its class computes for ``size``, and the tracker its grids.

    The position embeddings are tiled by the model's forward; nothing else depends on the picture.

    Args:
        vision_encoder: a shadow, which is changed. own: side of the picture that it is made for. tracker: a shadow's, which
            answers clicks.

    Returns:
        What the manifest says of it.

    Raises:
        SourceError: another backbone than the ViT, or a size that is none of its own.
    """
    backbone = vision_encoder.backbone
    layers = list(getattr(backbone, "layers", ()))
    if not layers or not all(hasattr(layer, "precompute_positions") for layer in layers):
        fact = f"its backbone, {type(backbone).__name__}, is made for pictures of {own} pixels: it has no rotary positions"
        raise SourceError(fact, remedy=f"Leave --image-size out, or give {own}.")
    config = copy.deepcopy(backbone.config)
    config.image_size = size
    patch = config.patch_size
    check_picture_size(size, patch, max(layer.window_size for layer in layers))
    for layer in layers:
        layer.position_ids = layer.precompute_positions(config, layer.window_size)
    if tracker is not None:
        grid, prompts = size // patch, tracker.prompt_encoder
        prompts.image_embedding_size, prompts.input_image_size = (grid, grid), size
        prompts.mask_input_size = (4 * grid, 4 * grid)
        tracker.backbone_feature_sizes = [[times * grid] * 2 for times in (4, 2, 1)]
    return size_note(size, own)
