"""The whole image model as six component files: ``export_pipeline`` and the sources it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam3x.pipeline.export import export_pipeline
    from sam3x.pipeline.reverify import verify_model as verify_pipeline
    from sam3x.sources.image import (
        checkpoint_image_source,
        module_image_source,
        random_image_source,
        transformers_image_source,
    )

_HOMES = {
    "export_pipeline": "sam3x.pipeline.export",
    "verify_pipeline": "sam3x.pipeline.reverify:verify_model",
    "checkpoint_image_source": "sam3x.sources.image",
    "module_image_source": "sam3x.sources.image",
    "random_image_source": "sam3x.sources.image",
    "transformers_image_source": "sam3x.sources.image",
}

__all__ = [
    "checkpoint_image_source",
    "export_pipeline",
    "module_image_source",
    "random_image_source",
    "transformers_image_source",
    "verify_pipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)
