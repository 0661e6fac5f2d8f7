"""transformers' ``Sam3Model`` and its kin, trackers and video models as components, recognized by what they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sam3x.errors import SourceError
from sam3x.sources.clicks import Clicks
from sam3x.sources.components import build_components, ranges_of
from sam3x.sources.contract import Expected, ImageModel
from sam3x.sources.encoder import reason_of, weights_hash
from sam3x.sources.meta.source import private_shadow, without
from sam3x.sources.names import INTERACTIVE_HEAD
from sam3x.sources.transformers import parts
from sam3x.sources.transformers.picture_size import resize
from sam3x.spec import ExportSpec

_PARTS = (
    "vision_encoder",
    "text_encoder",
    "text_projection",
    "geometry_encoder",
    "detr_encoder",
    "detr_decoder",
    "mask_decoder",
)
_VIDEO_PARTS = ("tracker_model", "tracker_neck")
_TRACKER_PARTS = ("vision_encoder", "prompt_encoder", "mask_decoder", "shared_image_embedding")
_CLICKS = Clicks(mask_threshold=0.0, max_hole_area=0.0, max_sprinkle_area=0.0, rows_of_mask_alone=2, largest_logit=None)
DETECTION_THRESHOLD = "detection_threshold"
"""What ``config.json`` may say: what detections of these weights score above, in place of transformers' own."""

_THRESHOLD = 0.3  # transformers' own
_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"


def is_transformers(model: nn.Module) -> bool:
    """Whether ``model`` has the parts of ``Sam3Model``."""
    return all(isinstance(getattr(model, name, None), nn.Module) for name in (*_PARTS, "dot_product_scoring"))


def is_tracker(model: nn.Module) -> bool:
    """Whether ``model`` has the parts of ``Sam3TrackerModel``."""
    return all(isinstance(getattr(model, name, None), nn.Module) for name in _TRACKER_PARTS)


def is_video(model: nn.Module) -> bool:
    """Whether ``model`` has the parts of ``Sam3VideoModel``: a detector, and a tracker that shares its trunk."""
    parts_there = all(isinstance(getattr(model, name, None), nn.Module) for name in ("detector_model", *_VIDEO_PARTS))
    return parts_there and is_transformers(model.detector_model)  # type: ignore[arg-type]


def tracker_model(model: nn.Module, origin: str, spec: ExportSpec, expected: Expected | None = None) -> ImageModel:
    """Split a ``Sam3TrackerModel``, which answers clicks alone, into vision encoder and interactive head; it is left as it is.

    Raises:
        SourceError: it cannot take pictures of the size that ``spec`` asks for.
        ArtifactError: its weights are not those ``expected``.
    """
    weights_sha256 = weights_hash(model)
    if expected is not None:
        expected.check(weights_sha256=weights_sha256)
    shadow: Any = private_shadow(model)
    size, notes = shadow.prompt_encoder.input_image_size, []
    if spec.image_size is not None and spec.image_size != size:
        notes.append(resize(shadow.vision_encoder, size, spec.image_size, shadow))
        size = spec.image_size
    modules = {"vision_encoder": parts.ClickEncoder(shadow), INTERACTIVE_HEAD: parts.InteractiveHead(_heads(shadow))}
    ranges = ranges_of(1, 1, fixed_length=False, prompts=spec.batch)
    return ImageModel(
        components=build_components(modules, 0, ranges, attention_mask=False),
        image_size=size,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        context_length=0,
        fixed_length=False,
        vocab_size=0,
        pad_id=0,
        box_text="",
        origin=origin,
        weights_sha256=weights_sha256,
        notes=tuple(notes),
        source="transformers",
        clicks=_CLICKS,
    )


def _heads(shadow: nn.Module) -> nn.Module:
    """What the interactive head uses of a tracker: neither vision encoder nor memory of frames."""
    return without(shadow, *(name for name, _ in shadow.named_children() if name not in _TRACKER_PARTS[1:]))


def transformers_model(
    model: nn.Module, origin: str, spec: ExportSpec, folder: Path | None = None, expected: Expected | None = None
) -> ImageModel:
    """Split a ``Sam3Model``, or a ``Sam3VideoModel`` with the interactive head of its tracker; it is left as it is.

    Args:
        spec: ``batch`` is how many prompts, ``image_size`` the side that pictures are to have. folder: where its tokenizer
            lies, if anywhere.

    Raises:
        SourceError: the folder's tokenizer files cannot be read, its configuration has a threshold that is none, or it cannot
            take pictures of that size.
        ArtifactError: its weights are not those ``expected``.
    """
    weights_sha256 = weights_hash(model)
    if expected is not None:
        expected.check(weights_sha256=weights_sha256)
    shadow: Any = private_shadow(model)
    video = None
    if is_video(model):
        video, shadow = shadow, shadow.detector_model
        video.__dict__["_modules"] = {"tracker_model": _heads(video.tracker_model), "tracker_neck": video.tracker_neck}
    config: Any = shadow.config
    size = config.vision_config.image_size
    size, notes = size if isinstance(size, int) else size[0], []
    if spec.image_size is not None and spec.image_size != size:
        tracker = None if video is None else video.tracker_model
        notes.append(resize(shadow.vision_encoder, size, spec.image_size, tracker))
        size = spec.image_size
    with torch.no_grad():  # fills the position caches too
        maps = shadow.vision_encoder(torch.zeros((1, 3, size, size))).fpn_hidden_states[:-1]
    grid = maps[-1].shape[-1]
    text = config.text_config
    # MobileCLIP stretches its positions to other lengths, and its convolutions see the padding
    fixed = any(
        "RepMixer" in type(module).__name__ or "PositionEmbedding" in type(module).__name__
        for module in shadow.text_encoder.modules()
    )
    queries = shadow.detr_decoder.query_embed.num_embeddings
    ranges = ranges_of(text.max_position_embeddings, queries, fixed_length=fixed, prompts=spec.batch)
    modules = {
        "vision_encoder": parts.VisionEncoder(shadow.vision_encoder, video),
        "text_encoder": parts.TextEncoder(shadow.text_encoder, shadow.text_projection),
        "prompt_encoder": parts.PromptEncoder(shadow.geometry_encoder, grid),
        "fusion_encoder": parts.FusionEncoder(shadow.detr_encoder, grid),
        "decoder": parts.Decoder(shadow, grid),
        "mask_head": parts.MaskHead(shadow.mask_decoder, grid),
        **({} if video is None else {INTERACTIVE_HEAD: parts.InteractiveHead(video.tracker_model)}),
    }
    return ImageModel(
        components=build_components(modules, len(maps) - 1, ranges, attention_mask=True),
        image_size=size,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        context_length=text.max_position_embeddings,
        fixed_length=fixed,
        vocab_size=text.vocab_size,
        pad_id=_pad_id(folder, text),
        box_text="visual",
        origin=origin,
        weights_sha256=weights_sha256,
        notes=tuple(notes),
        source="transformers",
        tokenizer=folder / _TOKENIZER if folder is not None and (folder / _TOKENIZER).is_file() else None,
        unescape_html=False,
        threshold=_threshold(config),
        mask_interpolation="probabilities",
        clicks=None if video is None else _CLICKS,
    )


def _threshold(config: Any) -> float:
    """What detections score above unless a caller says otherwise.

    Raises:
        SourceError: the configuration says something else than a number from 0 to 1.
    """
    value = getattr(config, DETECTION_THRESHOLD, None)
    if value is None:
        return _THRESHOLD
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        remedy = "Write a number from 0 to 1 into config.json, or take the line out."
        raise SourceError(f"{DETECTION_THRESHOLD} is {value!r}", remedy=remedy)
    return float(value)


def _pad_id(folder: Path | None, config: Any) -> int:
    """Token that fills texts up: the tokenizer's own, else the text encoder's.

    Raises:
        SourceError: the folder's tokenizer files are there and cannot be read.
    """
    found = None if folder is None else _tokenizer_pad_id(folder)
    return int(found if found is not None else getattr(config, "pad_token_id", None) or 0)


def _tokenizer_pad_id(folder: Path) -> int | None:
    """Id of the token that ``tokenizer_config.json`` pads with; None where it names none, or a tokenizer file is absent."""
    settings, vocabulary = folder / _TOKENIZER_CONFIG, folder / _TOKENIZER
    if not (settings.is_file() and vocabulary.is_file()):
        return None
    try:
        given = json.loads(settings.read_text(encoding="utf-8"))
        if not isinstance(given, dict):
            raise ValueError("it holds no object")
        token = given.get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token  # with its options, or its text alone
        if not isinstance(token, str | None):
            raise ValueError(f"its pad_token is {token!r}")
    except (OSError, ValueError, RecursionError) as error:  # unreadable, no JSON, not of this form, nested too deep
        raise _unreadable(settings, error) from error
    if token is None:
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(vocabulary)).token_to_id(token)
    except Exception as error:  # tokenizers raises plain Exception
        raise _unreadable(vocabulary, error) from error


def _unreadable(path: Path, error: Exception) -> SourceError:
    return SourceError(
        f"{path} cannot be read for the token that fills texts up ({reason_of(error)})",
        remedy=(
            "Save the tokenizer there again with save_pretrained, or take its files out of the folder and give --tokenizer."
        ),
    )
