"""A whole pipeline for pictures of another size than its model was made for: upstream's answers at that size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from sam3x.pipeline import export_pipeline, module_image_source, transformers_image_source, verify_pipeline
from sam3x.runtime import Segmenter
from sam3x.runtime.manifest import load_manifest
from support.folders import MadeOnce
from support.image_model import Predictor, between, iou, processor_result, tiny_image_model
from support.transformers_model import tiny

SIZE = 70
"""Five patches a side: windows of four are padded."""


@pytest.fixture(scope="module")
def folder(tiny_model: nn.Module, tiny_vocabulary: Path, made_once: MadeOnce) -> Path:
    def write(out: Path) -> None:
        export_pipeline(module_image_source(tiny_model), output=out, tokenizer=tiny_vocabulary, image_size=SIZE)

    return made_once("seventy_pixels", write)


@pytest.mark.long
def test_detections_and_clicks_are_upstreams_at_that_size(folder: Path, tiny_vocabulary: Path, picture: Image.Image) -> None:
    upstream = tiny_image_model(tiny_vocabulary, image_size=SIZE)
    segmenter = Segmenter(folder)
    assert segmenter.manifest.image_size == SIZE and segmenter.manifest.verified
    image = segmenter.encode(picture)
    every = processor_result(upstream, picture, "the red dog", threshold=0.0, size=SIZE)["scores"]
    threshold = between(every)
    wanted = processor_result(upstream, picture, "the red dog", threshold=threshold, size=SIZE)
    found = segmenter.segment(image, "the red dog", threshold=threshold)
    assert len(found) == len(wanted["scores"]) > 0
    np.testing.assert_allclose(found.scores, wanted["scores"], atol=1e-5)
    np.testing.assert_allclose(found.boxes, wanted["boxes"], atol=5e-3)  # pixels
    assert all(iou(mine, theirs) >= 0.999 for mine, theirs in zip(found.masks, wanted["masks"], strict=True))
    masks, scores, _ = Predictor(upstream, picture, SIZE)(point_coords=np.array([[320, 200]]), point_labels=np.array([1]))
    clicked = segmenter.click(image, points=[[320, 200]])
    np.testing.assert_allclose(clicked.scores.ravel(), scores, atol=1e-5)
    assert all(iou(mine, theirs.astype(bool)) >= 0.999 for mine, theirs in zip(clicked.masks, masks, strict=True))


@pytest.mark.long
def test_verified_again_from_the_manifest_alone(folder: Path, tiny_model: nn.Module) -> None:
    assert load_manifest(folder).spec["image_size"] == SIZE
    assert all(record.passed for record in verify_pipeline(folder, module_image_source(tiny_model)))


@pytest.mark.long
def test_a_folder_of_transformers(tmp_path: Path) -> None:
    tiny("Sam3Model").save_pretrained(tmp_path / "saved")
    source = transformers_image_source(tmp_path / "saved")
    made = export_pipeline(source, output=tmp_path / "out", image_size=SIZE, fuse=True)
    assert made.verified and made.image_size == SIZE
