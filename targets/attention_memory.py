"""The option of every target that works through tiles of queries: how much memory the scores of one attention may take."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator

from sam3x.targets.base import TargetOptions

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class AttentionMemory(TargetOptions):
    """A whole number and a unit, as in ``256MB``."""

    attention_memory: str = Field(
        "256MB",
        description="what the scores of one attention may take; default 256MB.",
        json_schema_extra={"metavar": "SIZE"},
    )

    @field_validator("attention_memory", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        found = re.fullmatch(r"([0-9]+)\s*([KMG]i?B|B)", value) if isinstance(value, str) else None
        if found is None or not 0 < int(found[1]) * _UNITS[found[2]] < 2**62:
            raise ValueError(f"expected a whole number above 0 and a unit ({', '.join(_UNITS)}), as in 256MB, got {value!r}")
        return f"{int(found[1])}{found[2]}"

    @property
    def attention_bytes(self) -> int:
        """``attention_memory`` in bytes."""
        number, unit = re.fullmatch(r"([0-9]+)(.*)", self.attention_memory).groups()  # type: ignore[union-attr]
        return int(number) * _UNITS[unit]
