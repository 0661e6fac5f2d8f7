"""Hyper-parameters of Meta's SAM3 image model, under upstream's names."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ImageModelConfig(BaseModel):
    """What ``sam3.model_builder.build_sam3_image_model`` hard-codes; the defaults are its values.

    Attributes:
        image_size: side of the square picture in pixels; a multiple of ``patch_size``.
        patch_size, embed_dim, depth, vit_heads, mlp_ratio, window_size, global_att_blocks, pretrain_img_size: the ViT trunk.
        text_width, text_heads, text_layers, context_length, vocab_size: the text encoder.
        d_model, num_heads, dim_feedforward: width, heads and hidden layer of everything after the trunks.
        neck_scales: of the feature maps against the trunk's; a last one of 0.5 is made and not used (SAM 3.1 has none).
        interactive: whether it has the head for clicks, and the neck's second branch that feeds it.
        encoder_layers, decoder_layers, geometry_layers, num_queries: fusion encoder, decoder, geometry encoder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = 1008
    patch_size: int = 14
    embed_dim: int = 1024
    depth: int = 32
    vit_heads: int = 16
    mlp_ratio: float = 4.625
    window_size: int = 24
    global_att_blocks: tuple[int, ...] = (7, 15, 23, 31)
    pretrain_img_size: int = 336
    text_width: int = 1024
    text_heads: int = 16
    text_layers: int = 24
    context_length: int = 32
    vocab_size: int = 49408
    neck_scales: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)
    d_model: int = 256
    num_heads: int = 8
    dim_feedforward: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    geometry_layers: int = 3
    num_queries: int = 200
    interactive: bool = False

    @property
    def description(self) -> str:
        """One phrase for the manifest."""
        kind = "SAM3" if self == ImageModelConfig(interactive=self.interactive) else "a SAM3 of other sizes"
        head = ", interactive head" if self.interactive else ""
        return f"{kind}, {self.image_size} pixels, ViT of {self.depth} layers, text of {self.text_layers} layers{head}"
