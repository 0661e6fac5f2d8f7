"""A precision that no machine here computes in, emulated behind the same three calls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sam3x.demo import WEIGHTS
from sam3x.demo.held_out import cases
from sam3x.fidelity.emulated import EmulatedSegmenter
from sam3x.fidelity.measure import against, answers_of
from sam3x.pipeline.request import resolve_pipeline
from sam3x.runtime import Segmenter
from sam3x.sources.image import transformers_image_source


@pytest.mark.parametrize(("precision", "furthest"), [("tf32", 0.02), ("fp16", 0.05)])
def test_a_rounded_model_is_near_the_exported_one_and_not_the_same(
    precision: str, furthest: float, demo_pipeline: Path
) -> None:
    some = cases(2)
    model = transformers_image_source(WEIGHTS)(resolve_pipeline("onnx", {}).spec)
    with Segmenter(demo_pipeline, threads=1) as segmenter, EmulatedSegmenter(demo_pipeline, model, precision) as emulated:
        first, second = answers_of(segmenter, some), answers_of(emulated, some)
    found = against(first, second, segmenter.manifest.threshold)
    assert 0 < found.score < furthest and found.worst_iou is not None and found.worst_iou > 0.8
    assert any(len(item.scores) for item in first)
    assert not all(np.array_equal(one.scores, two.scores) for one, two in zip(first, second, strict=True))
