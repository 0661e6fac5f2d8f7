"""Rotary tables of Meta's ViT in a checkpoint: kept where they are sound, rebuilt where ``.to(bfloat16)`` made them real."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

TABLE = "freqs_cis"
_SAME = 1e-4  # angles reach 71 radians, so float32 tables of two machines differ by some 1e-5
_ROUNDED = 1e-2  # of cosines in bfloat16


def rotary_tables(model: nn.Module) -> dict[str, Tensor]:
    """The tables that upstream computes for the sizes of ``model``, which may stand on the meta device; it is given them."""
    tables = {}
    for name, module in model.named_modules():
        if getattr(module, TABLE, None) is not None and hasattr(module, "_setup_rope_freqs"):
            with torch.device("cpu"):
                module._setup_rope_freqs()
            tables[f"{name}.{TABLE}"] = getattr(module, TABLE)
    return tables


def is_computed(attention: nn.Module) -> bool:
    """Whether the table of one of the ViT's layers is what upstream computes for its sizes. It is given the computed one."""
    stored: Any = getattr(attention, TABLE)
    attention._setup_rope_freqs()  # type: ignore[operator]
    computed = getattr(attention, TABLE)
    return stored is not None and stored.shape == computed.shape and float((stored - computed).abs().max()) <= _SAME


def sound_tables(rebuilt: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """For every rotary table the one to use, notes on what was rebuilt, and the names of those that cannot be.

    A stored complex table of unit modulus is used as it is, whatever its angles. One that was rounded or lost its
    imaginary part is rebuilt if what is left agrees with the rebuilt one. Absent and mis-shaped tables are not treated here.
    """
    used: dict[str, Tensor] = {}
    again: list[str] = []
    other: list[str] = []
    lost: list[str] = []
    for name, table in rebuilt.items():
        stored = state.get(name)
        if stored is None or stored.is_meta or stored.layout != torch.strided or stored.is_quantized:
            continue
        if stored.is_floating_point() and stored.shape == (*table.shape, 2):
            stored = torch.view_as_complex(stored.to(torch.float32).contiguous())  # how formats without complex numbers keep it
        elif not (stored.is_floating_point() or stored.is_complex()) or stored.shape != table.shape:
            continue
        full = stored.to(torch.complex64)
        if not bool(torch.isfinite(torch.view_as_real(full)).all()):
            continue
        if float((full - table).abs().max()) <= _SAME:
            used[name] = full.clone()
        elif float((full.abs() - 1).abs().max()) <= _SAME:
            used[name] = full.clone()
            other.append(name)
        elif float((full.real - table.real).abs().max()) <= _ROUNDED:
            used[name] = table
            again.append(name)
        else:
            lost.append(name)
    notes = []
    if again:
        notes.append(
            f"{len(again)} rotary tables rebuilt, which were stored rounded or as real numbers (.to(bfloat16) does that)"
        )
    if other:
        notes.append(f"{len(other)} rotary tables kept as stored, with other angles than SAM3's")
    return used, notes, lost
