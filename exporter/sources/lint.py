"""``sam3x lint``: what a checkpoint is, and what keeps it from being exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from sam3x.sources.checkpoint import load_state, some_of
from sam3x.sources.image_model import build_image_model
from sam3x.sources.state import TEXT, TRUNK, config_of, detector_keys, is_vit

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

_OTHERS = ("tracker.", "sam2_convs", "inst_interactive_predictor")
"""Parts of SAM3 that the image pipeline does not use."""


class LintReport(BaseModel):
    """What ``sam3x lint`` found.

    Attributes:
        kind: ``SAM3``, ``EfficientSAM3``, ``transformers`` or ``unknown``. parameters: numbers of the image model's part.
        facts: trunk, text encoder, context length, sizes, in words.
        missing, unexpected, misshaped, not_finite: names of weights, against the model that the shapes describe.
        traps: known defects of released files, a sentence each.
    """

    model_config = ConfigDict(frozen=True)

    path: str
    kind: str
    parameters: int
    dtypes: tuple[str, ...]
    facts: dict[str, str]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()
    traps: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether nothing stands in the way of an export; unexpected weights do not."""
        return not (self.missing or self.misshaped or self.not_finite or self.traps) and self.kind != "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFindings:
    """How a checkpoint differs from the model that its shapes describe."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]
    not_finite: tuple[str, ...]

    @property
    def errors(self) -> list[str]:
        """What keeps the checkpoint from being exported, a sentence each."""
        named = {"missing": self.missing, "mis-shaped": self.misshaped, "not finite": self.not_finite}
        return [f"{kind}: {some_of(names)}" for kind, names in named.items() if names]


def lint(path: str | Path) -> LintReport:
    """Look at a checkpoint without running anything in it.

    Raises:
        SourceError: it cannot be read as a checkpoint at all.
    """
    whole = load_state(path)
    state = detector_keys(whole)
    kind = kind_of(whole)
    found = StateFindings(missing=(), unexpected=(), misshaped=(), not_finite=infinite_in(state))
    facts: dict[str, str] = {}
    if kind == "SAM3" and not missing_groups(state):
        config = config_of(state, str(path))
        found = compare_state(build_image_model(config, device="meta").state_dict(), state)
        facts = {
            "picture": f"{config.image_size} pixels, patches of {config.patch_size}",
            "trunk": f"ViT, {config.depth} layers, width {config.embed_dim}",
            "text encoder": f"{config.text_layers} layers, width {config.text_width}, vocabulary {config.vocab_size:,}",
            "context length": f"{config.context_length} tokens",
            "after them": f"width {config.d_model}, {config.encoder_layers} fusion and {config.decoder_layers} decoder layers",
        }
    elif kind == "EfficientSAM3":
        facts = {"trunk": "a student's, not Meta's ViT", **_text_facts(state)}
    return LintReport(
        path=str(path),
        kind=kind,
        parameters=sum(value.numel() for value in state.values() if value.is_floating_point()),
        dtypes=tuple(sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})),
        facts=facts,
        missing=found.missing,
        unexpected=tuple(name for name in found.unexpected if not any(part in name for part in _OTHERS)),
        misshaped=found.misshaped,
        not_finite=found.not_finite,
        traps=tuple(_traps(state, kind)),
    )


def kind_of(state: Mapping[str, Tensor]) -> str:
    """Whose checkpoint it is, by the names in it."""
    if any(".detr_encoder." in f".{key}" or key.startswith("detector_model.") for key in state):
        return "transformers"
    own = detector_keys(state)
    if not any(key.startswith(prefix) for key in own for prefix in GROUPS):
        return "unknown"
    return "SAM3" if is_vit(own) and not any("student_trunk." in key for key in own) else "EfficientSAM3"


def missing_groups(state: Mapping[str, Tensor]) -> list[str]:
    """Parts of the image model that the checkpoint has nothing of."""
    return [prefix for prefix in GROUPS if not any(key.startswith(prefix) for key in state)]


def infinite_in(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Weights with NaN or infinite values."""
    return tuple(name for name, value in state.items() if value.is_floating_point() and not bool(torch.isfinite(value).all()))


def compare_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> StateFindings:
    """Names, shapes and values of a checkpoint against a model's own."""
    shapes = [(name, state[name], want) for name, want in expected.items() if name in state]
    return StateFindings(
        missing=tuple(name for name in expected if name not in state),
        unexpected=tuple(name for name in state if name not in expected),
        misshaped=tuple(
            f"{name} {tuple(have.shape)}, not {tuple(want.shape)}" for name, have, want in shapes if have.shape != want.shape
        ),
        not_finite=infinite_in({name: have for name, have, _ in shapes}),
    )


def _text_facts(state: Mapping[str, Tensor]) -> dict[str, str]:
    if f"{TEXT}token_embedding.weight" in state:
        return {"text encoder": "Meta's"}
    tables = [value for key, value in state.items() if "language_backbone" in key and "embedding" in key and value.dim() > 1]
    if not tables:
        return {}
    words = max(tables, key=len)
    return {"text encoder": f"a student's, width {words.shape[-1]}, vocabulary {words.shape[0]:,}"}


def _traps(state: Mapping[str, Tensor], kind: str) -> list[str]:
    if kind in ("transformers", "unknown"):
        return []
    found = [f"nothing under '{prefix}'" for prefix in missing_groups(state)]
    if "geometry_encoder." in missing_groups(state):
        found[found.index("nothing under 'geometry_encoder.'")] += (
            ": one released EfficientSAM3 file lacks it; prompts then use random weights"
        )
    if any("student_trunk." in key for key in state) and is_vit(state):
        found.append(f"both a student's trunk and the teacher's ViT under '{TRUNK}', which upstream drops in silence")
    return found
