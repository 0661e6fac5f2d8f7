"""What the names and shapes in an image model's checkpoint tell of its architecture."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sam3x.errors import SourceError
from sam3x.sources.image_config import ImageModelConfig

TRUNK = "backbone.vision_backbone.trunk."
NECK = "backbone.vision_backbone.convs."
TEXT = "backbone.language_backbone.encoder."
GROUPS = (
    "backbone.vision_backbone.",
    "backbone.language_backbone.",
    "geometry_encoder.",
    "transformer.encoder.",
    "transformer.decoder.",
    "segmentation_head.",
    "dot_prod_scoring.",
)
"""Prefixes that an image model's checkpoint has."""

_GROUP = re.compile(r"(?:^|\.)(?=(?P<group>" + "|".join(map(re.escape, GROUPS)) + "))")
_OTHERS = (
    "tracker.",
    "inst_interactive_predictor.",
    "backbone.vision_backbone.sam2_convs.",
    "backbone.vision_backbone.interactive_convs.",
    "backbone.vision_backbone.propagation_convs.",
)
"""Parts of SAM3 and SAM 3.1 that follow clicks and frames; the image model uses none of them but SAM3's head for clicks."""

INTERACTIVE = "inst_interactive_predictor.model."
_SAM2_NECK = "backbone.vision_backbone.sam2_convs."
_HEADS = ("sam_prompt_encoder.", "sam_mask_decoder.", "no_mem_embed")
"""What a tracker runs on a picture alone."""

_TRACKERS = frozenset({"tracker", "tracker_model", "sam2_predictor", "inst_interactive_predictor"})
"""Segments under which parts of the same names follow clicks and frames."""

_SIZES = {
    f"{TRUNK}patch_embed.proj.weight": 4,
    f"{TRUNK}pos_embed": 3,
    f"{TRUNK}blocks.0.mlp.fc1.weight": 2,
    f"{TEXT}token_embedding.weight": 2,
    f"{TEXT}positional_embedding": 2,
    f"{TEXT}transformer.resblocks.0.attn.in_proj_weight": 2,
    "geometry_encoder.encode.0.linear1.weight": 2,
    "transformer.encoder.layers.0.linear1.weight": 2,
    "transformer.decoder.layers.0.linear1.weight": 2,
    "transformer.decoder.query_embed.weight": 2,
}
"""Weights without which the sizes cannot be told, and their numbers of dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePart:
    """The image model's part of a checkpoint.

    Attributes:
        prefix: what stood before every name; taken off in ``state``.
        left_out: the first segments of the other names, and how many names begin so.
    """

    prefix: str
    state: dict[str, Tensor]
    left_out: Mapping[str, int]

    @property
    def notes(self) -> tuple[str, ...]:
        """The prefix and what was left out, a phrase each."""
        place = (f"keys under '{self.prefix}'",) if self.prefix else ()
        rest = ", ".join(f"'{name}' ({count})" for name, count in self.left_out.items())
        return (*place, *((f"left out, not part of the image model: {rest}",) if rest else ()))


def image_part(state: Mapping[str, Tensor], subject: str = "the checkpoint") -> ImagePart:
    """The weights of the image model under whatever prefix has the most of its parts, be it ``detector.`` or ``module.model.``.

    Raises:
        SourceError: two prefixes have as many.
    """
    groups: dict[str, set[str]] = {}
    for name in state:
        match = _GROUP.search(name)
        if match and not _TRACKERS.intersection(name[: match.start("group")].split(".")):
            groups.setdefault(name[: match.start("group")], set()).add(match["group"])
    most = max(map(len, groups.values()), default=0)
    best = sorted(prefix for prefix, found in groups.items() if len(found) == most)
    detectors = [prefix for prefix in best if "detector" in prefix.split(".")]
    best = detectors if len(detectors) == 1 else best
    if len(best) > 1:
        named = ", ".join(f"'{prefix}'" for prefix in best)
        raise SourceError(f"{subject} has {len(best)} image models, under {named}", remedy="Choose one with --weights-key KEY.")
    prefix = best[0] if best else ""
    own, others, clicks = {}, Counter[str](), _interactive(state, prefix)
    for name, value in state.items():
        short = name.removeprefix(prefix)
        other = next((part for part in _OTHERS if short.startswith(part)), None)
        if name in clicks:
            own[clicks[name]] = value
        elif not name.startswith(prefix):
            others[name.split(".")[0] + "."] += 1
        elif other is not None:
            others[f"{prefix}{other}"] += 1
        else:
            own[short] = value
    return ImagePart(prefix=prefix, state=own, left_out=dict(others))


def _interactive(state: Mapping[str, Tensor], prefix: str) -> dict[str, str]:
    """Name in the file → name in the model of what answers clicks; nothing unless each of its parts is there.

    The heads stand in the live model's place, or in the release's, the tracker beside the detector.
    """
    neck = f"{prefix}{_SAM2_NECK}"
    for place in (f"{prefix}{INTERACTIVE}", f"{prefix.removesuffix('detector.')}tracker."):
        parts = (neck, *(f"{place}{part}" for part in _HEADS))
        found = [name for name in state if name.startswith(parts)]
        if all(any(name.startswith(part) for name in found) for part in parts):
            return {
                name: name.removeprefix(prefix) if name.startswith(neck) else f"{INTERACTIVE}{name.removeprefix(place)}"
                for name in found
            }
    return {}


def follows_frames(name: str) -> bool:
    """Whether a weight of a live model belongs to its tracker's memory, which a picture alone does not use."""
    return name.startswith(INTERACTIVE) and not name.removeprefix(INTERACTIVE).startswith(_HEADS)


def is_sam31(state: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint is SAM 3.1's: its neck has heads for clicks and propagation, its tracker a decoder for clicks."""
    return any(
        "vision_backbone.interactive_convs." in name
        or "vision_backbone.propagation_convs." in name
        or "tracker.model.interactiv" in name
        for name in state
    )


def is_vit(state: Mapping[str, Tensor]) -> bool:
    """Whether the trunk is Meta's ViT."""
    return any(name.startswith((f"{TRUNK}blocks.", f"{TRUNK}patch_embed.")) or name == f"{TRUNK}pos_embed" for name in state)


def layers_in(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered layers stand under ``prefix``."""
    found = {int(match[1]) for key in state if (match := re.match(re.escape(prefix) + r"(\d+)\.", key))}
    return max(found) + 1 if found else 0


def missing_sizes(state: Mapping[str, Tensor]) -> list[str]:
    """Weights without which the sizes cannot be told: absent, or not of their number of dimensions."""
    return [name for name, rank in _SIZES.items() if name not in state or state[name].dim() != rank or not state[name].numel()]


def config_of(state: Mapping[str, Tensor], subject: str) -> ImageModelConfig:
    """The hyper-parameters that fit the shapes. A text head has 64 channels, as in SAM3: heads leave no trace in shapes.

    Raises:
        SourceError: not Meta's ViT image model, or a weight that tells a size is missing.
    """
    missing = missing_sizes(state)
    if missing:
        remedy = "Give a complete checkpoint; a model with another trunk or text encoder can be exported with --module."
        raise SourceError(
            f"{subject} does not tell the sizes of Meta's SAM3 image model without {', '.join(missing)}", remedy=remedy
        )
    own = ImageModelConfig()
    patch = state[f"{TRUNK}patch_embed.proj.weight"]
    depth = layers_in(state, f"{TRUNK}blocks.")
    tables = [state.get(f"{TRUNK}blocks.{i}.attn.freqs_cis") for i in range(depth)]
    sizes = [len(table) if table is not None and table.dim() > 1 else 0 for table in tables]
    grid = round(max(sizes) ** 0.5) or own.image_size // own.patch_size
    window = round(min((size for size in sizes if size), default=own.window_size**2) ** 0.5)
    halves = [table.shape[1] for table in tables if table is not None and table.dim() > 1]
    rotary = max(1, halves[0] if halves else 32) * 2  # complex pairs of one head's channels
    width, dim = patch.shape[0], state["transformer.decoder.query_embed.weight"].shape[1]
    positions = state[f"{TRUNK}pos_embed"].shape[1] - 1
    text_width = state[f"{TEXT}token_embedding.weight"].shape[1]
    bias = state.get("transformer.decoder.boxRPB_embed_x.layers.1.weight")
    return ImageModelConfig(
        image_size=grid * patch.shape[-1],
        patch_size=patch.shape[-1],
        embed_dim=width,
        depth=depth,
        vit_heads=max(1, width // rotary),
        mlp_ratio=state[f"{TRUNK}blocks.0.mlp.fc1.weight"].shape[0] / width,
        window_size=own.window_size if not any(sizes) else window if window != grid else 0,
        global_att_blocks=tuple(i for i, size in enumerate(sizes) if size == grid * grid) or own.global_att_blocks,
        pretrain_img_size=round(positions**0.5) * patch.shape[-1],
        text_width=text_width,
        text_heads=max(1, text_width // 64),
        text_layers=layers_in(state, f"{TEXT}transformer.resblocks."),
        context_length=state[f"{TEXT}positional_embedding"].shape[0],
        vocab_size=state[f"{TEXT}token_embedding.weight"].shape[0],
        neck_scales=own.neck_scales,
        d_model=dim,
        dim_feedforward=state["transformer.encoder.layers.0.linear1.weight"].shape[0],
        encoder_layers=layers_in(state, "transformer.encoder.layers."),
        decoder_layers=layers_in(state, "transformer.decoder.layers."),
        geometry_layers=layers_in(state, "geometry_encoder.encode."),
        num_queries=state["transformer.decoder.query_embed.weight"].shape[0],
        interactive=any(name.startswith(INTERACTIVE) for name in state),
        num_heads=own.num_heads if bias is None or bias.dim() != 2 else bias.shape[0],
    )
