"""A stand-in for EfficientSAM3's package: its builder's arguments, and a student under the package's names with few weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sam3x.sources.image_model import build_image_model
from support.image_model import TINY


class _Held(nn.Module):
    """What it holds under ``name``."""

    def __init__(self, **held: nn.Module) -> None:
        super().__init__()
        for name, module in held.items():
            self.add_module(name, module)


class Trunk(nn.Module):
    """1008 pixels to 8×8 features, as a list of one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = TINY.embed_dim
        features = nn.ModuleList([nn.AvgPool2d(9), nn.Conv2d(3, channels, 14, 14)])
        head = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.model: Any = _Held(backbone=_Held(model=_Held(features=features)), head=head)
        self.channel_list = [width]

    def forward(self, x: Any) -> list[Tensor]:
        x = x[0] if isinstance(x, list) else x
        for layer in self.model.backbone.model.features:
            x = layer(x)
        return [self.model.head(x)]


class Text(nn.Module):
    """Embedded tokens and their positions, normalized by each layer, projected."""

    def __init__(self, width: int, layers: int, context_length: int) -> None:
        super().__init__()
        places = _Held()
        places.pos_embed = nn.Parameter(torch.zeros(1, 1, context_length, width))
        blocks = (_Held(pre_norm_mha=nn.Sequential(nn.LayerNorm(width))) for _ in range(layers))
        self.encoder: Any = _Held(
            embedding_layer=nn.Embedding(64, width),
            positional_embedding=_Held(pos_embed=places),
            transformer=nn.ModuleList(blocks),
        )
        self.projector = nn.Linear(width, TINY.d_model)
        self.context_length = context_length
        self.tokenizer: Any = None

    def forward(self, text: Any, input_boxes: Any = None, device: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.tokenizer(text, context_length=self.context_length)
        embedded = self.encoder.embedding_layer(tokens)
        x = embedded + self.encoder.positional_embedding.pos_embed.pos_embed[0, :, : tokens.shape[1]]
        for block in self.encoder.transformer:
            x = x + block.pre_norm_mha(x)
        return (tokens != 0).bool().ne(1), self.projector(x).transpose(0, 1), embedded.transpose(0, 1)


def build_efficientsam3_image_model(
    *,
    device: str,
    eval_mode: bool,
    load_from_HF: bool,
    backbone_type: str,
    model_name: str,
    text_encoder_type: str | None = None,
    text_encoder_context_length: int = 77,
    enable_inst_interactivity: bool = False,
) -> nn.Module:
    """RepViT m0.9 and MobileCLIP-S0 alone."""
    if (backbone_type, model_name, text_encoder_type) != ("repvit", "m0.9", "MobileCLIP-S0"):
        raise ValueError(f"Unknown model: {backbone_type} {model_name} {text_encoder_type}")
    model: Any = build_image_model(TINY.model_copy(update={"interactive": enable_inst_interactivity}))
    model.backbone.vision_backbone.trunk = Trunk(384)
    model.backbone.language_backbone = Text(512, 4, text_encoder_context_length)
    return model.eval()
