"""What the names and shapes in an image model's checkpoint tell of its architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from sam3x.errors import SourceError
from sam3x.sources.image_config import ImageModelConfig

_PREFIX = "detector."
TRUNK = "backbone.vision_backbone.trunk."
TEXT = "backbone.language_backbone.encoder."


def detector_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image model's part of a checkpoint, without the prefix that Meta's and EfficientSAM3's files have."""
    if any(key.startswith(_PREFIX) for key in state):
        return {key[len(_PREFIX) :]: value for key, value in state.items() if key.startswith(_PREFIX)}
    return dict(state)


def is_vit(state: Mapping[str, Tensor]) -> bool:
    """Whether the trunk is Meta's ViT."""
    return f"{TRUNK}patch_embed.proj.weight" in state


def layers_in(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered layers stand under ``prefix``."""
    found = {int(match[1]) for key in state if (match := re.match(re.escape(prefix) + r"(\d+)\.", key))}
    return max(found) + 1 if found else 0


def config_of(state: Mapping[str, Tensor], subject: str) -> ImageModelConfig:
    """The hyper-parameters that fit the shapes. A text head has 64 channels, as in SAM3: heads leave no trace in shapes.

    Raises:
        SourceError: not Meta's ViT image model.
    """
    if not is_vit(state) or f"{TEXT}token_embedding.weight" not in state:
        raise SourceError(
            (
                f"{subject} is no checkpoint of Meta's SAM3 image model: there is no {TRUNK}patch_embed.proj.weight "
                f"or no {TEXT}token_embedding.weight"
            ),
            remedy="Export a model with another trunk with --module.",
        )
    patch = state[f"{TRUNK}patch_embed.proj.weight"]
    tables = {key: len(value) for key, value in state.items() if key.startswith(TRUNK) and key.endswith("freqs_cis")}
    depth = layers_in(state, f"{TRUNK}blocks.")
    own = ImageModelConfig()
    sizes = [tables.get(f"{TRUNK}blocks.{i}.attn.freqs_cis", 0) for i in range(depth)]
    grid = round(max(sizes, default=0) ** 0.5) or own.image_size // own.patch_size
    window = round(min((size for size in sizes if size), default=own.window_size**2) ** 0.5)
    width, dim = patch.shape[0], state["transformer.decoder.query_embed.weight"].shape[1]
    positions = state[f"{TRUNK}pos_embed"].shape[1] - 1
    text_width = state[f"{TEXT}token_embedding.weight"].shape[1]
    halves = {key: value.shape[-1] for key, value in state.items() if key.startswith(TRUNK) and key.endswith("freqs_cis")}
    rotary = next(iter(halves.values()), 32) * 2  # complex pairs of one head's channels
    return ImageModelConfig(
        image_size=grid * patch.shape[-1],
        patch_size=patch.shape[-1],
        embed_dim=width,
        depth=depth,
        vit_heads=max(1, width // rotary),
        mlp_ratio=state[f"{TRUNK}blocks.0.mlp.fc1.weight"].shape[0] / width,
        window_size=window if sizes and window != grid else own.window_size if not sizes else 0,
        global_att_blocks=tuple(i for i, size in enumerate(sizes) if size == grid * grid) or own.global_att_blocks,
        pretrain_img_size=round(positions**0.5) * patch.shape[-1],
        text_width=text_width,
        text_heads=max(1, text_width // 64),
        text_layers=layers_in(state, f"{TEXT}transformer.resblocks."),
        context_length=state[f"{TEXT}positional_embedding"].shape[0],
        vocab_size=state[f"{TEXT}token_embedding.weight"].shape[0],
        d_model=dim,
        dim_feedforward=state["transformer.encoder.layers.0.linear1.weight"].shape[0],
        encoder_layers=layers_in(state, "transformer.encoder.layers."),
        decoder_layers=layers_in(state, "transformer.decoder.layers."),
        geometry_layers=layers_in(state, "geometry_encoder.encode."),
        num_queries=state["transformer.decoder.query_embed.weight"].shape[0],
        num_heads=own.num_heads
        if "transformer.decoder.boxRPB_embed_x.layers.1.weight" not in state
        else state["transformer.decoder.boxRPB_embed_x.layers.1.weight"].shape[0],
    )
