"""A photograph, and the small pipeline of Meta's classes that has seen it; a file with a pipeline of its own has its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from PIL import Image

    from sam3x.runtime import Segmenter
    from sam3x.runtime.segmenter import EncodedImage


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    from support.image_model import photograph

    return photograph()


@pytest.fixture(scope="module")
def segmenter(tiny_pipeline: Path) -> Segmenter:
    from sam3x.runtime import Segmenter

    return Segmenter(tiny_pipeline)


@pytest.fixture(scope="module")
def encoded(segmenter: Segmenter, picture: Image.Image) -> EncodedImage:
    return segmenter.encode(picture)
