"""Full-size image models with random weights, for ``--module sam3x.pipeline.random_models:sam3``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sam3x.errors import SourceError
from sam3x.sources.image import draw_image_weights
from sam3x.sources.image_config import ImageModelConfig
from sam3x.sources.image_model import build_image_model

_GRID = 72  # image tokens a side that the fusion encoder expects at 1008 pixels
_TRUNK_WIDTH = 1024  # channels that EfficientSAM3's student trunks hand to the neck


def sam3() -> nn.Module:
    """SAM3's image model, 840 million parameters, weights different in every layer."""
    model = build_image_model(ImageModelConfig())
    draw_image_weights(model, 0)
    return model


def small_sam3() -> nn.Module:
    """Meta's architecture with every kind of layer once or twice, for pictures of 112 pixels."""
    from sam3x.pipeline.compatibility import SMALL

    model = build_image_model(SMALL)
    draw_image_weights(model, 0)
    return model


def interactive_sam3() -> nn.Module:
    """SAM3's interactive head at full size behind a trunk of one layer, on which a click after the encoding does not depend."""
    small: dict[str, Any] = {
        "depth": 1,
        "global_att_blocks": (0,),
        "text_layers": 1,
        "text_width": 64,
        "text_heads": 1,
        "vocab_size": 8,
    }
    model = build_image_model(ImageModelConfig(interactive=True, **small))
    draw_image_weights(model, 0)
    return model


def efficient_sam3(trunk: str = "repvit_m0_9", text_layers: int = 6) -> nn.Module:
    """An image model of EfficientSAM3's shape: timm's RepViT as trunk, MobileCLIP's text encoder as transformers has it.

    EfficientSAM3's own package cannot stand beside ``sam3`` (both have that name), so the student parts come from elsewhere;
    fusion encoder, decoder, geometry encoder and mask head are Meta's, at full size.

    Args:
        trunk: a timm backbone of stride 32. text_layers: 6 is MobileCLIP-S0.

    Raises:
        SourceError: timm or transformers is missing.
    """
    model = build_image_model(ImageModelConfig(depth=1, text_layers=1, text_width=64, text_heads=1, vocab_size=8))
    model.backbone.vision_backbone.trunk = _StudentTrunk(trunk)  # type: ignore[union-attr]
    model.backbone.language_backbone = _StudentText(text_layers)  # type: ignore[union-attr]
    draw_image_weights(model, 0)
    generator = torch.Generator().manual_seed(0)
    trunk_input = torch.randn((2, 3, 256, 256), generator=generator)
    settle(model.backbone.vision_backbone.trunk, trunk_input)  # type: ignore[union-attr,arg-type]
    settle(model.backbone.language_backbone.encoder, torch.randint(1, 1000, (8, 16), generator=generator))  # type: ignore[union-attr,arg-type]
    return model.eval()


def settle(module: nn.Module, example: Tensor) -> None:
    """Give its batch norms the statistics of what they see, as training does; with others, activations grow layer by layer."""
    norms = [item for item in module.modules() if isinstance(item, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the last bits of a sum, and so the weights, would depend on how many
    try:
        with torch.no_grad():
            module(example)
    finally:
        torch.set_num_threads(threads)
    for norm in norms:
        norm.eval()


class _StudentTrunk(nn.Module):
    """A timm backbone and a projection; its last map is stretched to the ViT's grid."""

    def __init__(self, name: str) -> None:
        super().__init__()
        timm = _needed("timm")
        self.backbone = timm.create_model(name, pretrained=False, features_only=True, out_indices=(-1,))
        channels = self.backbone.feature_info.channels()[-1]
        self.head = nn.Sequential(
            nn.Conv2d(channels, _TRUNK_WIDTH, 1, bias=False),
            nn.BatchNorm2d(_TRUNK_WIDTH),
            nn.GELU(),
            nn.Conv2d(_TRUNK_WIDTH, _TRUNK_WIDTH, 3, padding=1, bias=False),
        )
        self.channel_list = [_TRUNK_WIDTH]

    def forward(self, image: Tensor) -> list[Tensor]:
        found = self.head(self.backbone(image)[-1])
        return [functional.interpolate(found, size=(_GRID, _GRID), mode="bilinear", align_corners=False)]


class _StudentText(nn.Module):
    """What ``VETextEncoder.forward`` returns, around ``Sam3LiteTextTextModel``."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        transformers = _needed("transformers")
        config = transformers.Sam3LiteTextConfig(
            text_config={"num_hidden_layers": layers, "max_position_embeddings": 16}
        ).text_config
        self.encoder = transformers.Sam3LiteTextTextModel(config)
        self.resizer = nn.Linear(config.hidden_size, ImageModelConfig().d_model)
        self.context_length, self.tokenizer = config.max_position_embeddings, None

    def forward(self, text: list[str], input_boxes: Any = None, device: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        ids = self.tokenizer(text, context_length=self.context_length).to(device)  # type: ignore[misc]
        features = self.resizer(self.encoder(ids).last_hidden_state)
        return ids == 0, features.transpose(0, 1), features


def _needed(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        extra = {"timm": "sam3", "transformers": "transformers"}[package]
        raise SourceError(f"it needs {package}", remedy=f'Install it: pip install "sam3x[{extra}]".') from error
