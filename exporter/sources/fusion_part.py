"""The fusion encoder's weights in a checkpoint: found under any prefix, told apart from look-alikes, checked, loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from sam3x.errors import SourceError
from sam3x.sources.checkpoint import some_of

_LAYER_KEY = re.compile(r"^(?P<prefix>(?:.*\.)?)layers\.(?P<index>\d+)\.(?P<part>self_attn|cross_attn_image)\.(?P<rest>.+)$")
_LAYER_INDEX = re.compile(r"layers\.(\d+)\.")
# Sam3DetrEncoder in transformers; its layers also name the norms and the MLP otherwise
_TRANSFORMERS_KEY = re.compile(r"(?:^|\.)detr_encoder\.layers\.\d+\.(?:self_attn|cross_attn)\.q_proj\.")
_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundEncoder:
    """The encoder's part of a checkpoint: keys without ``prefix``, tensors as stored."""

    prefix: str
    state: dict[str, Tensor]


def find_encoder(state: Mapping[str, Tensor], subject: str = "the checkpoint") -> FoundEncoder:
    """The fusion encoder's weights under whatever prefix they have.

    A fusion layer is what has both ``self_attn`` and ``cross_attn_image``: the DETR decoder, the text encoder and the geometry
    encoder do not. The tracker's memory encoder does, and is told apart by its separate q, k and v projections.

    Raises:
        SourceError: none, several, or one whose projections are stored apart.
    """
    parts: dict[str, set[str]] = {}
    fused: set[str] = set()
    for key in state:
        match = _LAYER_KEY.match(key)
        if match:
            parts.setdefault(match["prefix"], set()).add(match["part"])
            if match["rest"].startswith("in_proj_"):
                fused.add(match["prefix"])
    encoders = sorted(prefix for prefix, found in parts.items() if len(found) == 2)
    usable = [prefix for prefix in encoders if prefix in fused]
    detectors = [prefix for prefix in usable if "detector" in prefix.split(".")]
    usable = detectors if len(detectors) == 1 else usable
    if len(usable) == 1:
        prefix = usable[0]
        return FoundEncoder(
            prefix=prefix, state={key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        )
    if usable:
        named = ", ".join(f"'{prefix}'" for prefix in usable)
        raise _misfit(subject, f"has {len(usable)} fusion encoders, under {named}", "Choose one with --weights-key KEY.")
    apart = [key for key in state if _TRANSFORMERS_KEY.search(key)]
    if apart:
        fact = f"is in the layout of transformers, with q, k and v apart ({apart[0]}), where Meta's has one in_proj_weight"
        raise _misfit(subject, fact, "Give Meta's sam3.pt, or pass the live module to sam3x.export.")
    if encoders:
        fact = f"keeps q, k and v apart under '{encoders[0]}', as the tracker's memory encoder does, not the fusion encoder"
        raise _misfit(subject, fact, "Give the checkpoint of the whole SAM3 image model.")
    fact = "has no fusion encoder: no keys <prefix>layers.0.self_attn.in_proj_weight and <prefix>layers.0.cross_attn_image.…"
    raise _misfit(subject, f"{fact}; it has: {some_of(state)}", "Give a SAM3 or EfficientSAM3 checkpoint.")


def _misfit(subject: str, fact: str, remedy: str = "Give a complete checkpoint.") -> SourceError:
    return SourceError(f"{subject} {fact}", remedy=remedy)


def hyper_parameters(found: FoundEncoder, subject: str = "the checkpoint") -> dict[str, Any]:
    """What the shapes tell of ``FusionConfig``; heads, norm order, activation and position flags leave no trace in them.

    Raises:
        SourceError: a layer is missing in between, or the width cannot be told.
    """
    state = found.state
    indices = {int(match[1]) for match in map(_LAYER_INDEX.match, state) if match}
    missing = (max(indices) + 1) - len(indices)
    if missing:
        absent = [f"{found.prefix}layers.{i}" for i in islice((i for i in count() if i not in indices), min(missing, _SHOWN))]
        raise _misfit(subject, f"lacks layers in between: {some_of(absent, missing)}")
    order = sorted(indices)
    width = _size(state, [f"layers.{i}.norm1.weight" for i in order], 1, 0)
    width = width or _size(state, [f"layers.{i}.self_attn.in_proj_weight" for i in order], 2, 1)
    if not width:
        fact = f"does not tell d_model: {found.prefix}layers.0.norm1.weight is missing or no vector"
        raise _misfit(subject, fact)
    sizes: dict[str, Any] = {"d_model": width, "num_layers": len(order)}
    hidden = _size(state, [f"layers.{i}.linear1.weight" for i in order], 2, 0)
    levels = _size(state, ["level_embed"], 2, 0)
    sizes.update({"dim_feedforward": hidden} if hidden else {}, **({"num_feature_levels": levels} if levels else {}))
    sizes["add_pooled_text_to_img_feat"] = any(key.startswith("text_pooling_proj.") for key in state)
    return sizes


def _size(state: Mapping[str, Tensor], keys: Iterable[str], rank: int, dim: int) -> int | None:
    return next((state[key].shape[dim] for key in keys if key in state and state[key].dim() == rank), None)


def load_weights(encoder: nn.Module, found: FoundEncoder, subject: str = "the checkpoint") -> str:
    """Give ``encoder`` (built on the meta device or not) the weights found, as float32; returns a note on what was converted.

    Raises:
        SourceError: missing, unexpected or mis-shaped keys, weights that are no plain numbers, or not finite.
    """
    expected = encoder.state_dict()
    full = lambda keys: some_of(found.prefix + key for key in keys)  # noqa: E731
    missing = [key for key in expected if key not in found.state]
    unexpected = [key for key in found.state if key not in expected]
    shapes = [(key, found.state[key], value) for key, value in expected.items() if key in found.state]
    wrong = [f"{key} {tuple(is_.shape)}, not {tuple(want.shape)}" for key, is_, want in shapes if is_.shape != want.shape]
    reports = {"missing": missing, "unexpected": unexpected, "mis-shaped": wrong}
    findings = [f"{kind}: {full(keys)}" for kind, keys in reports.items() if keys]
    if findings:
        what = f"does not fit the fusion encoder that its shapes describe: {'; '.join(findings)}"
        raise _misfit(subject, what, "Give a complete checkpoint, or the hyper-parameters it was trained with.")
    weights = {key: _plain(found.prefix + key, found.state[key], subject) for key in expected}
    encoder.load_state_dict(weights, strict=True, assign=True)
    converted = sorted({str(found.state[key].dtype).removeprefix("torch.") for key in expected} - {"float32"})
    return f"{' and '.join(converted)} weights converted to float32" if converted else ""


def _plain(key: str, value: Tensor, subject: str) -> Tensor:
    """A float32 copy that no longer depends on the mapped file."""
    plain = value.layout == torch.strided and value.device.type != "meta"
    if not plain or value.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        kind = str(value.dtype).removeprefix("torch.") + ("" if plain else " without stored values or sparse")
        raise _misfit(
            subject, f"holds {key} as {kind}, not plain floating point", "Give the checkpoint before it was quantized."
        )
    copied = value.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(copied).all()):
        bad = int((~torch.isfinite(copied)).sum())
        fact = f"has {bad} NaN or infinite values among the {copied.numel()} of {key}"
        raise _misfit(subject, fact, "Give an undamaged checkpoint.")
    return copied
