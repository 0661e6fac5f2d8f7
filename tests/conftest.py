"""What several test files share: a small encoder of Meta's own classes, and its artifact."""

from __future__ import annotations

import os
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


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small ``Sam3Image`` exported whole. Made once for all workers of a run. Read only."""
    from filelock import FileLock

    from support.image_model import tiny_image_model, write_vocabulary

    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # a worker's folder is inside the run's
    folder = root / "tiny_pipeline"
    with FileLock(str(folder) + ".lock"):
        if not (folder / "manifest.json").exists():
            from sam3x.pipeline import export_pipeline, module_image_source

            vocabulary = write_vocabulary(root / "tiny_bpe.txt.gz")
            export_pipeline(module_image_source(tiny_image_model(vocabulary)), output=folder, tokenizer=vocabulary)
    return folder
