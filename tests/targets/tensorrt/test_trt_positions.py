"""Encodings of positions, which transformers' models keep and a graph computes, are not rounded before they are there."""

from __future__ import annotations

import pytest

from sam3x.capture.component import capture_component
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.pipeline.request import resolve_pipeline
from sam3x.pipeline.samples import samples_of
from sam3x.sources.image import module_image_source
from sam3x.targets.tensorrt.check import drift
from support.transformers_model import tiny


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_vision_encoder_of_transformers_is_as_near_as_its_precision(precision: str) -> None:
    options = {"precision": precision, "compute_capability": "sm89"}
    request = resolve_pipeline("trt", options, components=["vision_encoder"])
    model = module_image_source(tiny("Sam3Model"))(request.spec).narrowed(request.components)
    vision, samples = model.components[0], samples_of(model, request)["vision_encoder"]
    passes = default_pipeline("select").then(*request.target.legalization_passes(request.options))
    program, _ = passes.run(capture_component(vision, samples[0]))
    assert all(item["cosine"] > 0.999 for item in drift(program, precision).values())
