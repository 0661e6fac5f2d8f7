"""The image model that the options of the command line name. Imports no torch until it is known to be well-formed."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from sam3x.errors import SpecError

if TYPE_CHECKING:
    from sam3x.sources.contract import ImageSourceFactory, SourceFactory
    from sam3x.sources.encoder import Source


class ImageSource(str, Enum):
    """Values of ``--source``, whose code the image model is; ``image_source`` says what each takes."""

    SAM3 = "sam3"
    TRANSFORMERS = "transformers"


def named_factory(
    source: ImageSource | None, checkpoint: Path | None, module: str | None, weights_key: str | None = None, *, pipeline: bool
) -> SourceFactory:
    """The fusion encoder, or with ``pipeline`` the image model, that the options name; without any, one of random weights.

    Raises:
        SpecError, SourceError: they contradict each other, or name nothing that can be read.
    """
    if pipeline:
        return image_source(source, checkpoint, module, weights_key)
    from sam3x.sources.encoder import encoder_factory

    return encoder_factory(encoder_source(checkpoint, module, weights_key))


def encoder_source(checkpoint: Path | None, module: str | None, weights_key: str | None = None) -> Source | None:
    """The fusion encoder that ``--checkpoint`` or ``--module`` names, loaded; None is the seeded default.

    Raises:
        SpecError: ``weights_key`` without a checkpoint.
        SourceError: it cannot be read as a fusion encoder.
    """
    if weights_key is not None and checkpoint is None:
        raise SpecError("--weights-key chooses among the weights of one file, which --checkpoint FILE names")
    if checkpoint is None and module is None:
        return None
    from sam3x.sources import encoder as sources

    return sources.checkpoint_source(str(checkpoint), weights_key) if module is None else sources.factory_source(module)


def image_source(
    source: ImageSource | None, checkpoint: Path | None, module: str | None, weights_key: str | None = None
) -> ImageSourceFactory:
    """The image model that ``--source``, ``--checkpoint`` and ``--module`` name; a folder is transformers'.

    Args:
        weights_key: ``--weights-key``, which weights of a checkpoint file that has several.

    Raises:
        SpecError: ``--source`` contradicts what was given.
    """
    from sam3x.sources import image as sources

    if source is ImageSource.TRANSFORMERS and (checkpoint is None or not checkpoint.is_dir()):
        raise SpecError("--source transformers takes --checkpoint FOLDER, as save_pretrained wrote it")
    if source is ImageSource.SAM3 and checkpoint is not None and checkpoint.is_dir():
        raise SpecError(f"--source sam3 takes a file, and {checkpoint} is a folder", remedy="Name the .pt or .safetensors.")
    if weights_key is not None and (checkpoint is None or checkpoint.is_dir()):
        raise SpecError("--weights-key chooses among the weights of one file, which --checkpoint FILE names")
    if checkpoint is not None and checkpoint.is_dir():
        return sources.transformers_image_source(checkpoint)
    if checkpoint is not None:
        return sources.checkpoint_image_source(checkpoint, weights_key)
    if module is not None:
        return sources.factory_image_source(module)
    return sources.random_image_source()
