"""sam3x: exports SAM3's transformer fusion encoder out of PyTorch. ``import sam3x`` imports neither torch nor a back end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam3x.api import export
    from sam3x.artifact.artifact import Artifact, load

__all__ = ["Artifact", "export", "load"]
__version__ = "0.1.0"

_HOMES = {"export": "sam3x.api", "load": "sam3x.artifact.artifact", "Artifact": "sam3x.artifact.artifact"}


def __getattr__(name: str) -> Any:
    """Import the public names where they are first used (PEP 562)."""
    import importlib

    if name in ("pipeline", "runtime"):
        return importlib.import_module(f"sam3x.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sam3x' has no attribute '{name}'")
