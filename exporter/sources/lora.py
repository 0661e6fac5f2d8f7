"""LoRA adapters beside the weights they adapt: merged as peft's ``merge_and_unload`` does, or refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sam3x.errors import SourceError

_MERGE = "Merge it in Python (peft's merge_and_unload) and save the merged model."
_FACTOR = re.compile(
    r"^(?P<module>.*)\.(?:lora_(?P<embedding>embedding_)?(?P<factor>A|B|down|up))"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<end>weight|bias))?$"
)
_PEFT_ATTENTION = ".base_layer.out_proj."
_SAVED = re.compile(r"\.modules_to_save\.(?P<adapter>[^.]+)\.")
_LATER_KINDS = ("lora_magnitude_vector", "lora_variant", "lora_bias")
_WEIGHTS = ("base_layer.weight", "weight", "base_layer.in_proj_weight", "in_proj_weight")
"""Where a module keeps the matrix that its adapter adds to; peft wraps the module, loralib does not."""


def is_adapter_name(name: str) -> bool:
    """Whether a weight belongs to a LoRA adapter."""
    return any(segment.startswith("lora_") for segment in name.split("."))


def merge_adapters(
    state: Mapping[str, Tensor], config: Mapping[str, Any], subject: str
) -> tuple[dict[str, Tensor], frozenset[str], str]:
    """``W + alpha / rank · B · A`` for every adapted weight, in float32, under the names of the model without an adapter.

    Args:
        config: peft's settings (``lora_alpha``, ``use_rslora``, …); empty where the file has none.

    Returns:
        All weights, the names of those that were merged, and a phrase that says so.

    Raises:
        SourceError: an adapter alone, several, of a kind that is not known here, or ``alpha`` is not told.
    """
    factors, used = _factors(state, subject)
    bases = {module: _base(state, module, pair) for module, pair in factors.items()}
    if not any(bases.values()):
        raise SourceError(
            f"{subject} holds a LoRA adapter alone ({len(factors)} modules), without the weights it adapts", remedy=_MERGE
        )
    lost = [module for module, base in bases.items() if base is None]
    if lost:
        raise _refusal(subject, f"the adapter of {lost[0]} has no weight of its shape to be added to")
    for name in ("use_dora", "fan_in_fan_out", "lora_bias", "alpha_pattern"):
        if config.get(name):
            raise _refusal(subject, f"its adapter was made with {name}, which is not merged here")
    merged: dict[str, Tensor] = {}
    scales: set[str] = set()
    for module, (first, second) in factors.items():
        rank = first.shape[0]
        alpha = _alpha(state.get(f"{module}.alpha"), config, module, subject)
        used.add(f"{module}.alpha")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        base = bases[module]
        assert base is not None
        merged[base] = state[base].to(torch.float32) + scale * _product(first, second)
        scales.add(f"alpha {alpha:g}, rank {rank}")
    kept = {name: merged.get(name, value) for name, value in state.items() if name not in used}
    renamed = _unwrapped(kept, subject)
    names = frozenset(new for new, old in renamed.items() if old in merged)
    note = f"a LoRA adapter merged into {len(merged)} weight{'s' * (len(merged) > 1)} ({'; '.join(sorted(scales))})"
    return {new: kept[old] for new, old in renamed.items()}, names, note


def _refusal(subject: str, fact: str) -> SourceError:
    return SourceError(f"{subject} holds a LoRA adapter: {fact}", remedy=_MERGE)


def _factors(state: Mapping[str, Tensor], subject: str) -> tuple[dict[str, tuple[Tensor, Tensor]], set[str]]:
    """Module → its A (rank, in, …) and its B (out, rank, …), and the names that were read."""
    found: dict[str, dict[str, Tensor]] = {}
    adapters: set[str] = set()
    used: set[str] = set()
    for name, value in state.items():
        if not is_adapter_name(name):
            continue
        match = _FACTOR.match(name)
        if f"{_PEFT_ATTENTION}lora_" in name:  # what such a model was trained with depends on the version of peft
            raise _refusal(subject, "peft's adapter of a MultiheadAttention, whose out_proj some versions of peft change twice")
        if match is None or match["end"] == "bias" or any(kind in name for kind in _LATER_KINDS):
            raise _refusal(subject, f"{name} is of a kind that is not merged here")
        side = "A" if match["factor"] in ("A", "down") else "B"
        used.add(name)
        adapters.add(match["adapter"] or "")
        value = value.to(torch.float32)
        if match["embedding"]:  # peft keeps those of an embedding the other way round
            side, value = ("B" if side == "A" else "A"), value.mT
        found.setdefault(match["module"], {})[side] = value
    if len(adapters) > 1:
        named = ", ".join(sorted(repr(name) for name in adapters))
        raise SourceError(f"{subject} holds {len(adapters)} LoRA adapters, {named}", remedy=_MERGE)
    half = [module for module, pair in found.items() if len(pair) < 2]
    if half:
        have = "A" if "A" in found[half[0]] else "B"
        raise _refusal(subject, f"{half[0]} has its lora_{have} and no lora_{'B' if have == 'A' else 'A'}")
    pairs = {module: (pair["A"], pair["B"]) for module, pair in found.items()}
    for module, (first, second) in pairs.items():
        if min(first.dim(), second.dim()) < 2 or not first.numel() or math.prod(second.shape[1:]) != first.shape[0]:
            shapes = f"{tuple(second.shape)} and {tuple(first.shape)}"
            raise _refusal(subject, f"the factors of {module} do not fit each other, {shapes}")
        if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
            raise _refusal(subject, f"the factors of {module} are not finite")
    return pairs, used


def _product(first: Tensor, second: Tensor) -> Tensor:
    """``B · A`` (out, in, …) of a linear layer or of a convolution, whose B is 1×1."""
    return torch.einsum("or,r...->o...", second.flatten(1), first)


def _base(state: Mapping[str, Tensor], module: str, pair: tuple[Tensor, Tensor]) -> str | None:
    """Name of the weight that has the shape of the product."""
    shape = (pair[1].shape[0], *pair[0].shape[1:])
    names = (f"{module}.{end}" for end in _WEIGHTS)
    return next((name for name in names if name in state and tuple(state[name].shape) == shape), None)


def _alpha(stored: Tensor | None, config: Mapping[str, Any], module: str, subject: str) -> float:
    """Of one module: what stands beside its factors, else in the settings."""
    value = stored.item() if stored is not None and stored.numel() == 1 else config.get("lora_alpha")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _refusal(
            subject, f"no lora_alpha in the file or in an adapter_config.json beside it tells how far {module} is changed"
        )
    return float(value)


def _unwrapped(state: Mapping[str, Tensor], subject: str) -> dict[str, str]:
    """Name in the model → name in the file: without peft's ``base_layer``, with its ``modules_to_save`` in place of theirs."""
    saved = {match["adapter"] for name in state if (match := _SAVED.search(name))}
    if len(saved) > 1:
        raise _refusal(subject, f"it saved modules of {len(saved)} adapters")
    result: dict[str, str] = {}
    for name in state:
        if ".original_module." in name:
            continue  # what the module was before it was trained as a whole
        new = _SAVED.sub(".", name).replace(".base_layer.", ".")
        if new in result:
            raise _refusal(subject, f"{name} and {result[new]} are one weight of the model")
        result[new] = name
    return result
