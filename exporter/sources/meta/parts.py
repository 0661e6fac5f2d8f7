"""Adapters around the parts of Meta's ``Sam3Image`` (and of EfficientSAM3's, which has the same classes).

Each calls upstream's own method; only layouts and names differ. Upstream is sequence-first inside, the contract is batch-first.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam3x.sources import adaptations
from sam3x.sources.names import PADDING

_TOKEN_LEVEL = -1  # upstream's ``num_feature_levels`` is 1: the transformer sees the last level


class VisionEncoder(nn.Module):
    """``image`` → ``backbone_fpn`` but the last, the last level flattened, and its position encoding.

    Args:
        tracker: of the interactive predictor. With it, what the interactive head takes of a picture follows.
    """

    backbone: Any

    def __init__(self, backbone: nn.Module, tracker: Any = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.clicks = None if tracker is None else _ClickFeatures(tracker)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        out = self.backbone.forward_image(image)
        *maps, last = out["backbone_fpn"]
        position = out["vision_pos_enc"][_TOKEN_LEVEL][:1]
        clicks = () if self.clicks is None else self.clicks(*out["sam2_backbone_out"]["backbone_fpn"][-3:])
        return (*maps, last.flatten(2).transpose(1, 2), position.flatten(2).transpose(1, 2), *clicks)


class _ClickFeatures(nn.Module):
    """The neck's second branch as ``Sam3Processor.set_image`` and ``Sam3Image.predict_inst`` hand it on."""

    def __init__(self, tracker: Any) -> None:
        super().__init__()
        self.conv_s0, self.conv_s1 = tracker.sam_mask_decoder.conv_s0, tracker.sam_mask_decoder.conv_s1
        self.no_mem_embed = tracker.no_mem_embed

    def forward(self, first: Tensor, second: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.conv_s0(first), self.conv_s1(second), last + self.no_mem_embed.reshape(1, -1, 1, 1)


class TextEncoder(nn.Module):
    """``input_ids`` → text features and their padding mask, through upstream's forward with its tokenizer answered."""

    def __init__(self, language_backbone: nn.Module) -> None:
        super().__init__()
        self.language_backbone = language_backbone

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        encoder = self.language_backbone
        encoder.__dict__["tokenizer"] = lambda texts, context_length: input_ids
        try:
            mask, features, _ = encoder([""], device=input_ids.device)
        finally:
            encoder.__dict__["tokenizer"] = None
        return features.transpose(0, 1), mask


class PromptEncoder(nn.Module):
    """Text, boxes and the geometry encoder's CLS token → one prompt. ``Sam3Image._encode_prompt`` without the lookups by id."""

    geometry_encoder: Any

    def __init__(self, geometry_encoder: nn.Module, size: int) -> None:
        super().__init__()
        self.geometry_encoder, self.size = geometry_encoder, size
        adaptations.without_points(geometry_encoder)
        adaptations.boxes_of_one_picture(geometry_encoder, batch_first=False)

    def forward(
        self,
        text_features: Tensor,
        text_mask: Tensor,
        boxes: Tensor,
        box_labels: Tensor,
        box_mask: Tensor,
        image_tokens: Tensor,
        image_pos: Tensor,
    ) -> tuple[Tensor, Tensor]:
        prompts = boxes.shape[0]
        points = boxes.new_zeros((0, prompts, 2))
        prompt = SimpleNamespace(  # what upstream's ``Prompt`` holds, without its checks of sizes
            box_embeddings=boxes.transpose(0, 1),
            box_labels=box_labels.transpose(0, 1),
            box_mask=box_mask,
            point_embeddings=points,
            point_mask=torch.zeros((prompts, 0), dtype=torch.bool),
            point_labels=torch.zeros((0, prompts), dtype=torch.long),
            mask_embeddings=None,
            mask_mask=None,
            mask_labels=None,
        )
        encoder = self.geometry_encoder
        with adaptations.unpinned(), adaptations.no_empty_joins(encoder):
            features, mask = encoder(
                geo_prompt=prompt,
                img_feats=[image_tokens.transpose(0, 1).expand(-1, prompts, -1)],
                img_sizes=[(self.size, self.size)],
                img_pos_embeds=[image_pos.transpose(0, 1).expand(-1, prompts, -1)],
            )
        joined = torch.cat([text_features.transpose(0, 1), features])
        return joined.transpose(0, 1), torch.cat([text_mask, mask], dim=1)


class Decoder(nn.Module):
    """``Sam3Image._run_decoder``: boxes (cx, cy, w, h as fractions), logits, presence, and the queries of the mask head."""

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, encoded: Tensor, image_pos: Tensor, prompt: Tensor, prompt_mask: Tensor) -> tuple[Tensor, ...]:
        prompts = encoded.shape[0]
        out: dict[str, Any] = {}
        self.model._run_decoder(  # type: ignore[operator]
            pos_embed=image_pos.transpose(0, 1).expand(-1, prompts, -1),
            memory=encoded.transpose(0, 1),
            src_mask=None,
            out=out,
            prompt=prompt.transpose(0, 1),
            prompt_mask=prompt_mask,
            encoder_out={
                "level_start_index": None,
                "spatial_shapes": np.array([[self.size, self.size]]),  # upstream needs numbers, not tensors
                "valid_ratios": torch.ones((prompts, 1, 2)),
            },
        )
        logits = out["pred_logits"].squeeze(-1)
        return out["pred_boxes"], logits, out["presence_logit_dec"], out["queries"]


class MaskHead(nn.Module):
    """``UniversalSegmentationHead`` on one picture's maps: mask logits of the given queries."""

    def __init__(self, segmentation_head: nn.Module, size: int) -> None:
        super().__init__()
        self.segmentation_head, self.size = segmentation_head, size
        segmentation_head.__dict__["act_ckpt"] = False  # checkpointing saves memory in training, its result is the same

    def forward(self, queries: Tensor, encoded: Tensor, prompt: Tensor, prompt_mask: Tensor, *maps: Tensor) -> tuple[Tensor]:
        prompts, _, width = encoded.shape
        out = self.segmentation_head(
            backbone_feats=[*maps, encoded.new_zeros((1, width, self.size, self.size))],  # replaced by ``encoded`` inside
            obj_queries=queries[None],
            image_ids=torch.zeros(prompts, dtype=torch.long),
            encoder_hidden_states=encoded.transpose(0, 1),
            prompt=prompt.transpose(0, 1),
            prompt_mask=prompt_mask,
        )
        return (out["pred_masks"],)


class InteractiveHead(nn.Module):
    """``SAM3InteractiveImagePredictor._predict``: the prompt encoder and the mask decoder, every object on the same picture.

    The rows of points are what upstream's prompt encoder makes of them: corners of a box (labels 2 and 3) first, then points (1
    wanted, 0 not), then one row of label -1; a mask alone has none. Rows of ``PADDING`` have no part in attention. Of the four
    masks the first is what upstream gives for ``multimask_output=False``, its choice by stability included, the others are for
    ``multimask_output=True``.
    """

    prompt_encoder: Any
    mask_decoder: Any

    def __init__(self, tracker: Any) -> None:
        super().__init__()
        self.prompt_encoder, self.mask_decoder = tracker.sam_prompt_encoder, tracker.sam_mask_decoder

    def forward(
        self,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        image_embed: Tensor,
        high_res_feats_0: Tensor,
        high_res_feats_1: Tensor,
    ) -> tuple[Tensor, Tensor]:
        encoder, decoder = self.prompt_encoder, self.mask_decoder
        sparse = encoder._embed_points(point_coords, point_labels, pad=False)
        _, given = encoder(points=None, boxes=None, masks=mask_input)
        _, absent = encoder(points=None, boxes=None, masks=None)
        prompts = {
            "image_embeddings": image_embed,
            "image_pe": encoder.get_dense_pe(),
            "sparse_prompt_embeddings": sparse,
            "dense_prompt_embeddings": torch.where(has_mask_input[:, None, None, None], given, absent),
            "repeat_image": True,
            "high_res_features": [high_res_feats_0, high_res_feats_1],
        }
        with adaptations.sdp_kernels_kept():
            with adaptations.keys_hidden(*padded(decoder, point_labels)):
                found = decoder.predict_masks(**prompts)
            with adaptations.answering(decoder, "predict_masks", found):  # once for one mask and for three
                single, single_iou, *_ = decoder(**prompts, multimask_output=False)
                several, several_iou, *_ = decoder(**prompts, multimask_output=True)
        return torch.cat([single, several], dim=1), torch.cat([single_iou, several_iou], dim=1)

    def of_points(
        self,
        point_coords: Tensor,
        point_labels: Tensor,
        image_embed: Tensor,
        high_res_feats_0: Tensor,
        high_res_feats_1: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What upstream's predictor runs for an object's points and ``multimask_output=True``, for benchmarks: nothing more."""
        sparse, dense = self.prompt_encoder(points=(point_coords, point_labels), boxes=None, masks=None)
        with adaptations.sdp_kernels_kept():
            masks, scores, *_ = self.mask_decoder(
                image_embeddings=image_embed,
                image_pe=self.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=True,
                repeat_image=False,
                high_res_features=[high_res_feats_0, high_res_feats_1],
            )
        return masks, scores


def padded(decoder: Any, point_labels: Tensor) -> tuple[list[nn.Module], Tensor]:
    """The attention of a mask decoder whose keys are its tokens, and which of those are padding, (objects, tokens) bool."""
    own = ("obj_score_token", "iou_token", "mask_tokens")
    tokens = sum(getattr(decoder, name).num_embeddings for name in own if hasattr(decoder, name))
    absent = point_labels == PADDING
    hidden = torch.cat([absent.new_zeros((point_labels.shape[0], tokens)), absent], dim=1)
    layers = decoder.transformer.layers
    return [part for layer in layers for part in (layer.self_attn, layer.cross_attn_image_to_token)], hidden
