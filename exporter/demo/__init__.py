"""A small SAM3 that is trained: pictures of shapes, the model, its training. ``model()`` is the model with its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam3x.demo.network import model

__all__ = ["WEIGHTS", "model"]

WEIGHTS = Path(__file__).parent / "sam3x-demo"
"""The trained model as transformers' ``save_pretrained`` writes it, with its tokenizer."""


def __getattr__(name: str) -> Any:
    if name != "model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sam3x.demo import network

    return network.model
