"""Small models of transformers' own classes, with weights that differ in every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sam3x.sources.image import draw_image_weights

SIZE = 112
VISION = {
    "backbone_config": {
        "model_type": "sam3_vit_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 14,
        "window_size": 4,
        "global_attn_indexes": [1],
        "pretrain_image_size": 56,
    },
    "fpn_hidden_size": 32,
    "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
}
WIDTHS = {"hidden_size": 32, "num_attention_heads": 4}
PARTS = {
    "vision_config": VISION,
    "geometry_encoder_config": {**WIDTHS, "num_layers": 1, "intermediate_size": 64},
    "detr_encoder_config": {**WIDTHS, "num_layers": 2, "intermediate_size": 64},
    "detr_decoder_config": {**WIDTHS, "num_layers": 2, "intermediate_size": 64, "num_queries": 12},
    "mask_decoder_config": {**WIDTHS},
}
ONE_LAYER = {**PARTS["detr_decoder_config"], "num_layers": 1}  # only the text encoder is another than Sam3Model's
TEXT = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "projection_dim": 16,
    "max_position_embeddings": 12,
    "eos_token_id": 599,
    "pad_token_id": 1,
}


def tiny(kind: str) -> nn.Module:
    import transformers

    if kind == "Sam3Model":
        text = {"model_type": "clip_text_model", "num_hidden_layers": 2, **TEXT}
        config: Any = transformers.Sam3Config(text_config=text, **PARTS)
    else:
        text = {"num_hidden_layers": 3, "use_repmixer_blocks": True, **TEXT}
        config = transformers.Sam3LiteTextConfig(text_config=text, **{**PARTS, "detr_decoder_config": ONE_LAYER})
    model = getattr(transformers, kind)(config).eval()
    draw_image_weights(model, 3)
    return model


HEADS = {
    "prompt_encoder_config": {"hidden_size": 32, "image_size": SIZE, "patch_size": 14, "mask_input_channels": 16},
    "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 4, "mlp_dim": 64, "iou_head_hidden_dim": 32},
}


def tiny_tracker() -> nn.Module:
    import transformers

    model = transformers.Sam3TrackerModel(transformers.Sam3TrackerConfig(vision_config=VISION, **HEADS)).eval()
    return _drawn(model, model)


def tiny_video() -> nn.Module:
    """A detector, and a tracker with a memory of frames over the same trunk, as in the release."""
    import transformers

    text = {"model_type": "clip_text_model", "num_hidden_layers": 2, **TEXT}
    memory = {
        "memory_attention_hidden_size": 32,
        "memory_attention_num_layers": 1,
        "memory_attention_num_attention_heads": 1,
        "memory_attention_downsample_rate": 1,
        "memory_attention_feed_forward_hidden_size": 32,
        "memory_attention_rope_feat_sizes": [8, 8],
        "memory_encoder_hidden_size": 32,
        "memory_encoder_output_channels": 16,
        "mask_downsampler_embed_dim": 32,
        "memory_fuser_embed_dim": 32,
        "memory_fuser_intermediate_dim": 32,
        "memory_fuser_num_layers": 1,
    }
    config = transformers.Sam3VideoConfig(
        detector_config={"model_type": "sam3", "text_config": text, **PARTS},
        tracker_config={"model_type": "sam3_tracker_video", "vision_config": VISION, "image_size": SIZE, **HEADS, **memory},
    )
    model = transformers.Sam3VideoModel(config).eval()
    return _drawn(model, model.tracker_model)


def _drawn(model: nn.Module, tracker: Any) -> nn.Module:
    """``model`` with weights; the table of positions stands in two places of its tracker, as in the release."""
    draw_image_weights(model, 3)
    with torch.no_grad():
        tracker.shared_image_embedding.positional_embedding.copy_(tracker.prompt_encoder.shared_embedding.positional_embedding)
    return model
