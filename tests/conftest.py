"""What several test files share: a small encoder of Meta's own classes, and its artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import nn

SMALL = {"d_model": 32, "num_layers": 1, "num_heads": 4, "dim_feedforward": 64}
"""``FusionConfig`` fields of the encoder that is quick to export."""


@pytest.fixture(scope="session")
def small_encoder() -> nn.Module:
    """One layer, width 32, weights drawn with seed 3."""
    from sam3x.fusion_config import FusionConfig
    from sam3x.sources import build_encoder, draw_weights

    encoder = build_encoder(FusionConfig(**SMALL)).eval()
    draw_weights(encoder, seed=3)
    return encoder


@pytest.fixture(scope="session")
def default_artifact(small_encoder: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of ``small_encoder`` exported with the default options. Read only: copy it before changing it."""
    import sam3x

    folder = tmp_path_factory.mktemp("artifact") / "out"
    sam3x.export(small_encoder, target="onnx", output=folder)
    return folder
