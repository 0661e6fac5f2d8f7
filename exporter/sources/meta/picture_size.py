"""Meta's ``Sam3Image`` for a picture of another size, as ``sam3.model_builder`` would build it."""

from __future__ import annotations

from typing import Any

from torch import nn

from sam3x.errors import SourceError
from sam3x.sources.picture_size import check_picture_size, size_note
from sam3x.sources.rotary import TABLE, is_computed


def resize(model: Any, own: int, size: int, tracker: Any = None) -> str:
    """Give the ViT of a private tree the rotary tables that upstream computes for ``size``, and the tracker its grid.

    The position embeddings are tiled by upstream's forward; nothing else depends on the picture.

    Args:
        model: a shadow, which is changed. own: side of the picture that it is made for. tracker: the shadow's, which answers
            clicks.

    Returns:
        What the manifest says of it.

    Raises:
        SourceError: another trunk than Meta's ViT, one whose tables are not computed so, or a size that is none of its own.
    """
    trunk = model.backbone.vision_backbone.trunk
    blocks = _blocks(trunk)
    if not blocks:
        fact = f"its trunk, {type(trunk).__name__}, is made for pictures of {own} pixels: it has no rotary tables of Meta's ViT"
        raise SourceError(fact, remedy=f"Leave --image-size out, or give {own}.")
    patch = trunk.patch_embed.proj.stride[0]
    check_picture_size(size, patch, max(block.window_size for block in blocks))
    grid = (size // patch, size // patch)
    for attention in (block.attn for block in blocks if block.window_size == 0):
        if attention.use_rel_pos or not is_computed(attention):
            fact = f"its ViT has learnt positions or rotary tables of its own for pictures of {own} pixels"
            raise SourceError(fact, remedy=f"Leave --image-size out, or give {own}.")
        attention.input_size = grid
        attention._setup_rope_freqs()
    model.transformer.decoder.__dict__.update(compilable_cord_cache=None, compilable_stored_size=None)
    if tracker is not None:
        prompts = tracker.sam_prompt_encoder
        prompts.image_embedding_size, prompts.input_image_size = grid, (size, size)
        prompts.mask_input_size = (4 * grid[0], 4 * grid[1])
    return size_note(size, own)


def _blocks(trunk: nn.Module) -> list[Any]:
    """The layers of Meta's ViT; none of another trunk."""
    blocks = list(getattr(trunk, "blocks", ()))
    known = all(hasattr(block, "window_size") and hasattr(getattr(block, "attn", None), TABLE) for block in blocks)
    return blocks if known and hasattr(trunk, "patch_embed") else []
