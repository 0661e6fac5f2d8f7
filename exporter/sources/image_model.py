"""Meta's own ``Sam3Image``, put together as upstream's model builder does, on a machine without CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sam3x.errors import SourceError
from sam3x.sources import adaptations
from sam3x.sources.encoder import reason_of, untouched
from sam3x.sources.image_config import ImageModelConfig


def build_image_model(config: ImageModelConfig, tokenizer: Callable[..., Any] | None = None, device: str = "cpu") -> nn.Module:
    """``Sam3Image`` with upstream's own components; ``device="meta"`` allocates no weights.

    ``sam3.model_builder`` itself needs CUDA: it precomputes position encodings and the decoder's coordinates there. Both are
    caches that fill themselves on first use, so they are left empty here.

    Args:
        tokenizer: upstream's ``SimpleTokenizer`` or a callable like it; needed only to give the eager model strings.

    Raises:
        SourceError: the sam3 package, or something it needs, is missing.
    """
    with untouched():
        try:
            from sam3.model.sam3_image import Sam3Image
        except Exception as error:  # forks of the package raise RuntimeError for a missing video reader
            fact = f"Meta's sam3 package cannot be imported ({reason_of(error)})"
            raise SourceError(fact, remedy='Install it: pip install "sam3x[sam3]".') from error
        with torch.device(device), adaptations.numbers_on_cpu():
            model = Sam3Image(
                backbone=_backbone(config, tokenizer),
                transformer=_transformer(config),
                input_geometry_encoder=_geometry_encoder(config),
                segmentation_head=_segmentation_head(config),
                num_feature_levels=1,
                o2m_mask_predict=True,
                dot_prod_scoring=_scoring(config),
                use_instance_query=False,
                multimask_output=True,
                inst_interactive_predictor=_interactive(config) if config.interactive else None,
            )
    return model.float().eval()


def _positions(config: ImageModelConfig) -> nn.Module:
    from sam3.model.position_encoding import PositionEmbeddingSine

    return PositionEmbeddingSine(num_pos_feats=config.d_model, normalize=True, scale=None, temperature=10000)


def _attention(config: ImageModelConfig, **options: Any) -> nn.Module:
    from sam3.model.model_misc import MultiheadAttentionWrapper

    return MultiheadAttentionWrapper(num_heads=config.num_heads, embed_dim=config.d_model, **{"dropout": 0.1, **options})


def _backbone(config: ImageModelConfig, tokenizer: Callable[..., Any] | None) -> nn.Module:
    from sam3.model.necks import Sam3DualViTDetNeck
    from sam3.model.text_encoder_ve import VETextEncoder
    from sam3.model.vitdet import ViT
    from sam3.model.vl_combiner import SAM3VLBackbone

    trunk = ViT(
        img_size=config.image_size,
        pretrain_img_size=config.pretrain_img_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.vit_heads,
        mlp_ratio=config.mlp_ratio,
        norm_layer="LayerNorm",
        drop_path_rate=0.1,
        qkv_bias=True,
        use_abs_pos=True,
        tile_abs_pos=True,
        global_att_blocks=config.global_att_blocks,
        rel_pos_blocks=(),
        use_rope=True,
        use_interp_rope=True,
        window_size=config.window_size,
        pretrain_use_cls_token=True,
        retain_cls_token=False,
        ln_pre=True,
        ln_post=False,
        return_interm_layers=False,
        bias_patch_embed=False,
    )
    neck = Sam3DualViTDetNeck(
        position_encoding=_positions(config),
        d_model=config.d_model,
        scale_factors=list(config.neck_scales),
        trunk=trunk,
        add_sam2_neck=config.interactive,
    )
    text = VETextEncoder(
        tokenizer=tokenizer,
        d_model=config.d_model,
        width=config.text_width,
        heads=config.text_heads,
        layers=config.text_layers,
        context_length=config.context_length,
        vocab_size=config.vocab_size,
    )
    return SAM3VLBackbone(visual=neck, text=text, scalp=int(config.neck_scales[-1] < 1))


def _transformer(config: ImageModelConfig) -> nn.Module:
    from sam3.model.decoder import TransformerDecoder, TransformerDecoderLayer
    from sam3.model.encoder import TransformerEncoderFusion
    from sam3.model.model_misc import TransformerWrapper

    encoder = TransformerEncoderFusion(
        layer=_encoder_layer(config, batch_first=True, pos_enc_at_attn=True, pos_enc_at_cross_attn_keys=False),
        num_layers=config.encoder_layers,
        d_model=config.d_model,
        num_feature_levels=1,
        frozen=False,
        use_act_checkpoint=True,
        add_pooled_text_to_img_feat=False,
        pool_text_with_mask=True,
    )
    layer = TransformerDecoderLayer(
        activation="relu",
        d_model=config.d_model,
        dim_feedforward=config.dim_feedforward,
        dropout=0.1,
        cross_attention=_attention(config),
        n_heads=config.num_heads,
        use_text_cross_attention=True,
    )
    decoder = TransformerDecoder(
        layer=layer,
        num_layers=config.decoder_layers,
        num_queries=config.num_queries,
        return_intermediate=True,
        box_refine=True,
        num_o2m_queries=0,
        dac=True,
        boxRPB="log",
        d_model=config.d_model,
        frozen=False,
        interaction_layer=None,
        dac_use_selfatt_ln=True,
        use_act_checkpoint=True,
        presence_token=True,
    )
    return TransformerWrapper(encoder=encoder, decoder=decoder, d_model=config.d_model)


def _encoder_layer(
    config: ImageModelConfig, *, batch_first: bool, pos_enc_at_attn: bool, pos_enc_at_cross_attn_keys: bool
) -> nn.Module:
    from sam3.model.encoder import TransformerEncoderLayer

    return TransformerEncoderLayer(
        activation="relu",
        d_model=config.d_model,
        dim_feedforward=config.dim_feedforward,
        dropout=0.1,
        pos_enc_at_attn=pos_enc_at_attn,
        pos_enc_at_cross_attn_queries=False,
        pos_enc_at_cross_attn_keys=pos_enc_at_cross_attn_keys,
        pre_norm=True,
        self_attention=_attention(config, batch_first=batch_first),
        cross_attention=_attention(config, batch_first=batch_first),
    )


def _geometry_encoder(config: ImageModelConfig) -> nn.Module:
    from sam3.model.geometry_encoders import SequenceGeometryEncoder

    return SequenceGeometryEncoder(
        pos_enc=_positions(config),
        encode_boxes_as_points=False,
        points_direct_project=True,
        points_pool=True,
        points_pos_enc=True,
        boxes_direct_project=True,
        boxes_pool=True,
        boxes_pos_enc=True,
        d_model=config.d_model,
        num_layers=config.geometry_layers,
        layer=_encoder_layer(config, batch_first=False, pos_enc_at_attn=False, pos_enc_at_cross_attn_keys=True),
        use_act_ckpt=True,
        add_cls=True,
        add_post_encode_proj=True,
    )


def _segmentation_head(config: ImageModelConfig) -> nn.Module:
    from sam3.model.maskformer_segmentation import PixelDecoder, UniversalSegmentationHead

    return UniversalSegmentationHead(
        hidden_dim=config.d_model,
        upsampling_stages=3,
        aux_masks=False,
        presence_head=False,
        dot_product_scorer=None,
        act_ckpt=True,
        cross_attend_prompt=_attention(config, dropout=0),
        pixel_decoder=PixelDecoder(num_upsampling_stages=3, interpolation_mode="nearest", hidden_dim=config.d_model),
    )


def _interactive(config: ImageModelConfig) -> nn.Module:
    """What ``SAM3InteractiveImagePredictor`` runs on a picture, in its place in the tree, without the memory of its tracker."""
    from sam3.model.sam3_tracker_base import Sam3TrackerBase

    predictor, tracker = nn.Module(), nn.Module()
    tracker.__dict__.update(  # what upstream's method reads of itself
        hidden_dim=config.d_model,
        mem_dim=1,
        image_size=config.image_size,
        backbone_stride=config.patch_size,
        sam_mask_decoder_extra_args={  # of ``sam3.model_builder.build_tracker``
            "dynamic_multimask_via_stability": True,
            "dynamic_multimask_stability_delta": 0.05,
            "dynamic_multimask_stability_thresh": 0.98,
        },
    )
    Sam3TrackerBase._build_sam_heads(tracker)
    del tracker.obj_ptr_proj, tracker.obj_ptr_tpos_proj  # of the memory
    tracker.no_mem_embed = nn.Parameter(torch.zeros(1, 1, config.d_model))
    predictor.model = tracker
    return predictor


def _scoring(config: ImageModelConfig) -> nn.Module:
    from sam3.model.model_misc import MLP, DotProductScoring

    mlp = MLP(
        input_dim=config.d_model,
        hidden_dim=config.dim_feedforward,
        output_dim=config.d_model,
        num_layers=2,
        dropout=0.1,
        residual=True,
        out_norm=nn.LayerNorm(config.d_model),
    )
    return DotProductScoring(d_model=config.d_model, d_proj=config.d_model, prompt_mlp=mlp)
