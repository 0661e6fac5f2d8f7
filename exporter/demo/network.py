"""The small SAM3: transformers' own classes, every part of the real one, for pictures of 72 by 72 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sam3x.demo import WEIGHTS
from sam3x.demo.questions import BOXES_ALONE, WORDS, plural
from sam3x.demo.scenes import SIZE
from sam3x.errors import SourceError

CONTEXT = 8
"""Most tokens of a text, begin and end included."""

PATCH = 8
GRID = SIZE // PATCH
"""Image tokens a side; masks have four times as many pixels a side."""

WIDTH = 64
"""Of everything behind the vision and text encoders."""

_HEADS, _QUERY_GRID = 4, 4
_SPECIAL = ("[pad]", "[begin]", "[end]", "[unk]")
VOCABULARY = (*_SPECIAL, BOXES_ALONE, *WORDS, *(plural(word) for word in WORDS[:6]))


def model() -> nn.Module:
    """The trained small model, a ``transformers.Sam3Model`` in float32, ready to be exported.

    Raises:
        SourceError: transformers is missing.
    """
    from sam3x.sources.transformers.folder import read_folder

    read = read_folder(WEIGHTS)
    read.report.refuse()
    return read.model


def untrained(seed: int = 0) -> nn.Module:
    """The same architecture with the weights that training begins with.

    Raises:
        SourceError: transformers is missing.
    """
    try:
        import transformers
    except ImportError:
        raise SourceError("it needs transformers", remedy='Install it: pip install "sam3x[transformers]".') from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = transformers.Sam3Model(_config(transformers))
        _begin(built)
    return built


def _config(transformers: Any) -> Any:
    part = {"hidden_size": WIDTH, "num_attention_heads": _HEADS, "dropout": 0.0}
    wide = {**part, "intermediate_size": 4 * WIDTH}
    return transformers.Sam3Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 96,
                "intermediate_size": 288,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": SIZE,
                "patch_size": PATCH,
                "window_size": 3,
                "global_attn_indexes": [1, 3],
                "pretrain_image_size": SIZE,
            },
            "fpn_hidden_size": WIDTH,
            "backbone_feature_sizes": [[4 * GRID, 4 * GRID], [2 * GRID, 2 * GRID], [GRID, GRID]],
        },
        text_config={
            "model_type": "clip_text_model",
            "vocab_size": len(VOCABULARY),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "projection_dim": 4,
            "max_position_embeddings": CONTEXT,
            "hidden_act": "gelu",
            "pad_token_id": VOCABULARY.index("[pad]"),
            "bos_token_id": VOCABULARY.index("[begin]"),
            "eos_token_id": VOCABULARY.index("[end]"),
        },
        geometry_encoder_config={**wide, "num_layers": 1, "intermediate_size": 2 * WIDTH, "roi_size": 3},
        detr_encoder_config={**wide, "num_layers": 3, "intermediate_size": 2 * WIDTH},
        detr_decoder_config={**wide, "num_layers": 3, "num_queries": _QUERY_GRID**2},
        mask_decoder_config={**part, "num_upsampling_stages": 2},
    )


def _begin(model: Any) -> None:
    """Weights of unit scale in place of transformers' 0.02, queries on a grid over the picture."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    decoder, text = model.detr_decoder, model.text_encoder
    with torch.no_grad():
        places = _places(GRID)
        directions = torch.randn(places.shape[1], model.config.vision_config.backbone_config.hidden_size)
        positions = model.vision_encoder.backbone.embeddings.position_embeddings
        positions.copy_((places @ directions / places.shape[1] ** 0.5 / 2)[None])
        for table, scale in (
            (text.get_input_embeddings(), 0.5),
            (text.text_model.embeddings.position_embedding, 0.1),
            (model.geometry_encoder.label_embed, 1.0),
            (model.geometry_encoder.cls_embed, 1.0),
            (decoder.presence_token, 0.5),
            (decoder.query_embed, 0.5),
        ):
            table.weight.normal_(std=scale)
        at = (torch.arange(_QUERY_GRID) + 0.5) / _QUERY_GRID
        y, x = torch.meshgrid(at, at, indexing="ij")
        boxes = torch.stack([x.flatten(), y.flatten(), *[torch.full((_QUERY_GRID**2,), 0.3)] * 2], dim=1)
        decoder.reference_points.weight.copy_(torch.logit(boxes))
        decoder.box_head.layer3.weight.mul_(0.05)
        for bias in (decoder.box_rpb_embed_x, decoder.box_rpb_embed_y):  # a query looks inside its box from the start
            bias.layer1.weight[:2] = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])  # how far before, how far behind it
            bias.layer2.weight[:, :2] = -torch.tensor([12.0, 8.0, 4.0, 1.0])[:, None]


def _places(grid: int) -> Tensor:
    """(grid², 10): where each image token is, as numbers that a linear layer can read: x, y, and their waves."""
    at = (torch.arange(grid) + 0.5) / grid * 2 - 1
    y, x = (value.flatten() for value in torch.meshgrid(at, at, indexing="ij"))
    waves = [wave(torch.pi * turn * value) for value in (x, y) for turn in (1, 2) for wave in (torch.sin, torch.cos)]
    return torch.stack([2 * x, 2 * y, *waves], dim=1)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Prompts of a batch of pictures, N in all.

    Attributes:
        ids, valid: (N, length) tokens, and which are no padding. boxes: (N, B, 4) cx, cy, w, h as fractions of the picture.
        labels: (N, B) 1 for an example of what is wanted. given: (N, B) which boxes are no padding. picture: (N,) of the batch.
    """

    ids: Tensor
    valid: Tensor
    boxes: Tensor
    labels: Tensor
    given: Tensor
    picture: Tensor


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What the model makes of ``Asked``, for L decoder layers and Q queries.

    Attributes:
        logits: (L, N, Q). boxes: (L, N, Q, 4) cx, cy, w, h. presence: (L, N). queries: (N, Q, width) of the last layer.
        encoded: (N, tokens, width). prompt, valid: (N, length, width) and (N, length). maps: feature maps, a row a picture.
    """

    logits: Tensor
    boxes: Tensor
    presence: Tensor
    queries: Tensor
    encoded: Tensor
    prompt: Tensor
    valid: Tensor
    maps: tuple[Tensor, ...]


def answer(model: Any, pixels: Tensor, asked: Asked) -> Answered:
    """Everything but masks, as the exported components compute it, for prompts of several pictures at once.

    Args:
        pixels: (pictures, 3, 72, 72), normalized.
    """
    seen = model.vision_encoder(pixels)
    maps, positions = seen.fpn_hidden_states[:-1], seen.fpn_position_encoding[:-1][-1][:1]
    image = maps[-1][asked.picture]
    position = positions.expand(len(image), -1, -1, -1)
    text = model.text_encoder(input_ids=asked.ids, attention_mask=asked.valid.long(), return_dict=True)
    drawn = model.geometry_encoder(
        box_embeddings=asked.boxes,
        box_mask=asked.given,
        box_labels=asked.labels,
        img_feats=(image,),
        img_pos_embeds=(position,),
    )
    without = ~asked.given.any(dim=1, keepdim=True)  # as in the exported prompt encoder: no box, no say
    prompt = torch.cat([model.text_projection(text.last_hidden_state), drawn.last_hidden_state], dim=1)
    valid = torch.cat([asked.valid, drawn.attention_mask & ~without], dim=1)
    encoded = model.detr_encoder(
        vision_features=[image], text_features=prompt, vision_pos_embeds=[position], text_mask=valid
    ).last_hidden_state
    decoded = model.detr_decoder(
        vision_features=encoded,
        text_features=prompt,
        vision_pos_encoding=position.flatten(2).transpose(1, 2),
        text_mask=valid,
        spatial_shapes=np.array([[GRID, GRID]]),
    )
    hidden = decoded.intermediate_hidden_states
    begun = decoded.reference_boxes.float().clamp(1e-3, 1 - 1e-3)
    scores = model.dot_product_scoring(decoder_hidden_states=hidden, text_features=prompt, text_mask=valid)
    return Answered(
        logits=scores.squeeze(-1).float(),
        boxes=(torch.logit(begun) + model.detr_decoder.box_head(hidden).float()).sigmoid(),
        presence=decoded.presence_logits.squeeze(-1).float(),
        queries=hidden[-1],
        encoded=encoded,
        prompt=prompt,
        valid=valid,
        maps=maps,
    )


def masks(model: Any, answered: Answered, picture: Tensor, prompts: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Mask logits (M, K, 36, 36) of ``queries`` (M, K) of ``prompts`` (M,), and (M, 1, 36, 36) of everything meant."""
    own = picture[prompts]
    *maps, last = answered.maps
    rows = answered.queries[prompts[:, None], queries]
    made = model.mask_decoder(
        decoder_queries=rows,
        backbone_features=[*(item[own] for item in maps), last[own]],  # the last is replaced by ``encoded``
        encoder_hidden_states=answered.encoded[prompts],
        prompt_features=answered.prompt[prompts],
        prompt_mask=answered.valid[prompts],
    )
    return made.pred_masks.float(), made.semantic_seg.float()


def tokenize(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids (N, length) int64 and which are no padding (N, length) bool, as ``tokenizer.json`` gives them."""
    numbers = {word: index for index, word in enumerate(VOCABULARY)}
    unknown = numbers["[unk]"]
    rows = [
        [numbers["[begin]"], *(numbers.get(word, unknown) for word in text.lower().split()), numbers["[end]"]] for text in texts
    ]
    longest = max(map(len, rows))
    ids = np.array([[*row, *[numbers["[pad]"]] * (longest - len(row))] for row in rows], dtype=np.int64)
    return ids, np.arange(longest)[None] < np.array([[len(row)] for row in rows])


def save(model: Any, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` in float16 and ``tokenizer.json``; ``model`` stays as it is."""
    import copy

    copy.deepcopy(model).half().save_pretrained(folder, safe_serialization=True)
    (folder / "model.safetensors").chmod(0o644)  # transformers leaves it to its owner alone
    _tokenizer().save(str(folder / "tokenizer.json"))


def _tokenizer() -> Any:
    """A word a token, in lower case; what stands in no picture is ``[unk]``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="[unk]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(word, VOCABULARY.index(word)) for word in ("[begin]", "[end]")]
    made.post_processor = processors.TemplateProcessing(single="[begin] $A [end]", special_tokens=ends)
    return made
