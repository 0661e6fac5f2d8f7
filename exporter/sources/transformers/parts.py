"""Adapters around the parts of transformers' ``Sam3Model`` and ``Sam3LiteTextModel``.

They are batch-first inside, as the contract is; their masks are True for what is valid, the contract's True for padding.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam3x.sources import adaptations
from sam3x.sources.meta.parts import padded


class VisionEncoder(nn.Module):
    """``image`` → feature maps but the two last, the second last flattened, and its position encoding.

    Args:
        video: a ``Sam3VideoModel``. With it, what the interactive head takes of a picture follows.
    """

    def __init__(self, vision_encoder: nn.Module, video: nn.Module | None = None) -> None:
        super().__init__()
        self.vision_encoder = vision_encoder
        self.clicks = None if video is None else _ClickFeatures(video)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        out = self.vision_encoder(image)
        *maps, last = out.fpn_hidden_states[:-1]  # as ``Sam3Model.forward``
        position = out.fpn_position_encoding[:-1][-1][:1]
        clicks = () if self.clicks is None else self.clicks(out.last_hidden_state)
        return (*maps, last.flatten(2).transpose(1, 2), position.flatten(2).transpose(1, 2), *clicks)


class _ClickFeatures(nn.Module):
    """The tracker's neck as ``Sam3VideoModel`` and, on a frame without memory, its tracker hand it on.

    ``Sam3TrackerModel`` of transformers 5.24, over the same weights, adds ``no_memory_embedding`` to the level that it drops.
    """

    video: Any

    def __init__(self, video: nn.Module) -> None:
        super().__init__()
        self.video = video

    def forward(self, last_hidden_state: Tensor) -> tuple[Tensor, ...]:
        tracker, images = self.video.tracker_model, last_hidden_state.shape[0]
        maps, _ = self.video.get_vision_features_for_tracker(SimpleNamespace(last_hidden_state=last_hidden_state))
        *first, last = maps
        sizes = tracker.backbone_feature_sizes
        flat = (*first, last + tracker.no_memory_embedding)
        return tuple(item.permute(1, 2, 0).reshape(images, -1, *size) for item, size in zip(flat, sizes, strict=True))


class TextEncoder(nn.Module):
    """``Sam3Model.get_text_features``."""

    def __init__(self, text_encoder: nn.Module, text_projection: nn.Module) -> None:
        super().__init__()
        self.text_encoder, self.text_projection = text_encoder, text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        out = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask.long(), return_dict=True)
        return self.text_projection(out.last_hidden_state), ~attention_mask


class PromptEncoder(nn.Module):
    """Text and boxes → one prompt. Without a box the geometry encoder has no say: its CLS token is masked too."""

    def __init__(self, geometry_encoder: nn.Module, size: int) -> None:
        super().__init__()
        self.geometry_encoder, self.size = geometry_encoder, size
        adaptations.boxes_of_one_picture(geometry_encoder, batch_first=True)

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
        out = self.geometry_encoder(
            box_embeddings=boxes,
            box_mask=~box_mask,
            box_labels=box_labels,
            img_feats=(as_map(image_tokens, self.size).expand(prompts, -1, -1, -1),),
            img_pos_embeds=(as_map(image_pos, self.size).expand(prompts, -1, -1, -1),),
        )
        unused = box_mask.all(dim=1, keepdim=True)
        mask = torch.cat([text_mask, ~out.attention_mask | unused], dim=1)
        return torch.cat([text_features, out.last_hidden_state], dim=1), mask


class FusionEncoder(nn.Module):
    """``Sam3DetrEncoder``."""

    def __init__(self, detr_encoder: nn.Module, size: int) -> None:
        super().__init__()
        self.detr_encoder, self.size = detr_encoder, size

    def forward(self, image_tokens: Tensor, image_pos: Tensor, prompt: Tensor, prompt_mask: Tensor) -> tuple[Tensor]:
        out = self.detr_encoder(
            vision_features=[as_map(image_tokens, self.size)],
            text_features=prompt,
            vision_pos_embeds=[as_map(image_pos, self.size).expand(image_tokens.shape[0], -1, -1, -1)],
            text_mask=~prompt_mask,
        )
        return (out.last_hidden_state,)


class Decoder(nn.Module):
    """``Sam3DetrDecoder`` and the heads that ``Sam3Model.forward`` puts on its last layer."""

    detr_decoder: Any
    scoring: Any

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.detr_decoder, self.scoring, self.size = model.detr_decoder, model.dot_product_scoring, size
        self.inverse_sigmoid = sys.modules[type(model).__module__].inverse_sigmoid

    def forward(self, encoded: Tensor, image_pos: Tensor, prompt: Tensor, prompt_mask: Tensor) -> tuple[Tensor, ...]:
        out = self.detr_decoder(
            vision_features=encoded,
            text_features=prompt,
            vision_pos_encoding=image_pos.expand(encoded.shape[0], -1, -1),
            text_mask=~prompt_mask,
            spatial_shapes=np.array([[self.size, self.size]]),  # numbers, not tensors
        )
        hidden = out.intermediate_hidden_states[-1:]
        boxes = (self.inverse_sigmoid(out.reference_boxes[-1:]) + self.detr_decoder.box_head(hidden)).sigmoid()
        logits = self.scoring(decoder_hidden_states=hidden, text_features=prompt, text_mask=~prompt_mask).squeeze(-1)
        return boxes[0], logits[0], out.presence_logits[-1], hidden[0]


class MaskHead(nn.Module):
    """``Sam3MaskDecoder`` on one picture's maps: mask logits of the given queries."""

    def __init__(self, mask_decoder: nn.Module, size: int) -> None:
        super().__init__()
        self.mask_decoder, self.size = mask_decoder, size

    def forward(self, queries: Tensor, encoded: Tensor, prompt: Tensor, prompt_mask: Tensor, *maps: Tensor) -> tuple[Tensor]:
        out = self.mask_decoder(
            decoder_queries=queries,
            backbone_features=[*maps, encoded.new_zeros((1, encoded.shape[-1], self.size, self.size))],  # replaced inside
            encoder_hidden_states=encoded,
            prompt_features=prompt,
            prompt_mask=~prompt_mask,
        )
        return (out.pred_masks,)


def as_map(tokens: Tensor, size: int) -> Tensor:
    """(B, size², C) → (B, C, size, size)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], size, size)


class ClickEncoder(nn.Module):
    """``Sam3TrackerModel.get_image_embeddings``: ``image`` → ``high_res_feats_0``, ``high_res_feats_1``, ``image_embed``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        first, second, last = self.model.get_image_embeddings(image)  # type: ignore[operator]
        return first, second, last


class InteractiveHead(nn.Module):
    """``Sam3TrackerModel.forward`` behind its vision encoder, an object a row of the batch; of a video model's tracker, too.

    Rows of points and the four masks as in ``sam3x.sources.meta.parts.InteractiveHead``; a mask alone has two rows of label -1.
    """

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        adaptations.every_mask(model.mask_decoder)  # type: ignore[arg-type]

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
        encoder, objects = self.model.prompt_encoder, point_coords.shape[0]
        sparse = encoder._embed_points(point_coords[:, None], point_labels[:, None], pad=False)
        empty = {"input_points": None, "input_labels": None, "input_boxes": None}
        _, given = encoder(**empty, input_masks=mask_input)
        _, absent = encoder(**empty, input_masks=None)
        with adaptations.keys_hidden(*padded(self.model.mask_decoder, point_labels)):
            masks, scores, *_ = self.model.mask_decoder(
                image_embeddings=image_embed.expand(objects, -1, -1, -1),
                image_positional_embeddings=self.model.get_image_wide_positional_embeddings().expand(objects, -1, -1, -1),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=torch.where(has_mask_input[:, None, None, None], given, absent),
                multimask_output=False,
                high_resolution_features=[high_res_feats_0, high_res_feats_1],
            )
        return masks[:, 0], scores[:, 0]

    def of_points(
        self,
        point_coords: Tensor,
        point_labels: Tensor,
        image_embed: Tensor,
        high_res_feats_0: Tensor,
        high_res_feats_1: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What upstream runs for one object's points and ``multimask_output=True``, for benchmarks: nothing more."""
        points = {"input_points": point_coords[:, None], "input_labels": point_labels[:, None]}
        sparse, dense = self.model.prompt_encoder(**points, input_boxes=None, input_masks=None)
        masks, scores, *_ = self.model.mask_decoder(
            image_embeddings=image_embed,
            image_positional_embeddings=self.model.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
            high_resolution_features=[high_res_feats_0, high_res_feats_1],
        )
        return masks[:, 0], scores[:, 0]
