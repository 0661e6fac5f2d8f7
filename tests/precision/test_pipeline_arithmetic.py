"""Pipelines that compute below float32, for ExecuTorch and TensorRT: verified by the rule of decision 0010."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sam3x.artifact.manifest import sealed
from sam3x.capture.program import Sample
from sam3x.pipeline import export_pipeline, module_image_source, verify_pipeline
from sam3x.pipeline.compatibility import SMALL
from sam3x.pipeline.request import resolve_pipeline
from sam3x.pipeline.samples import samples_of
from sam3x.precision.component import reduced
from sam3x.runtime import Segmenter
from sam3x.runtime.manifest import load_manifest
from sam3x.sources.contract import Component
from sam3x.sources.image import random_image_source
from sam3x.sources.names import DETECTOR
from sam3x.targets.executorch.target import PteOptions, PteTarget
from sam3x.verify.component import verify_component
from sam3x.verify.convolutions import exact, half_summed
from sam3x.verify.emulate import eager_in
from support.image_model import photograph

HALF = PteOptions(precision="fp16")


@pytest.fixture(scope="module")
def parts() -> dict[str, tuple[Component, list[Sample]]]:
    """Component and what it is verified on, by name."""
    request = resolve_pipeline("onnx", {})
    model = random_image_source(SMALL)(request.spec)
    samples = samples_of(model, request)
    return {item.name: (item, samples[item.name]) for item in model.components}


@pytest.mark.long
def test_a_whole_pipeline_in_fp16_runs_in_executorch(tmp_path: Path) -> None:
    """Every component by the rule, masks as eager's but for rounding, and all of it by the runtime."""
    manifest = export_pipeline(random_image_source(SMALL), target="pte", precision="fp16", output=tmp_path / "out")
    assert manifest.verified and {item.name for item in manifest.components} == set(DETECTOR)
    records = [record for item in manifest.components for record in item.verification]
    assert all(record.passed and record.from_unrounded is None for record in records)
    rounded = [(record.rms_rel, record.eager_rms_rel) for record in records if record.eager_rms_rel]
    assert len(rounded) > 10 and all(own is not None and own < 3 * eager for own, eager in rounded)
    assert all(record.max_abs == 0 for record in records if record.output == "text_mask")
    assert manifest.quality is not None and manifest.quality.precision == "fp16" and manifest.quality.mean_iou > 0.95
    found = Segmenter(tmp_path / "out").segment(photograph(), [[1, 7, 9]], [[60.0, 80.0, 300.0, 390.0]], threshold=0.0)
    assert len(found) == SMALL.num_queries and np.isfinite(found.scores).all()


@pytest.mark.long
@pytest.mark.parametrize("component", ["vision_encoder", "decoder"])
def test_a_component_in_int8_is_verified(component: str, tmp_path: Path) -> None:
    """One picture traced, and two for the quantized graph; layers that share weights, which XNNPACK would run at once."""
    options: dict[str, Any] = {"target": "pte", "precision": "int8", "components": [component]}
    manifest = export_pipeline(random_image_source(SMALL), output=tmp_path / "out", **options)
    records = manifest.component(component).verification
    assert manifest.verified and all(record.passed for record in records) and any(record.max_rel > 1e-3 for record in records)


class Fixed:
    """A runner that gives eager's own results, times ``factor``."""

    def __init__(self, results: list[Mapping[str, Tensor]], factor: float) -> None:
        self.waiting = [{name: value.numpy() * np.float32(factor) for name, value in result.items()} for result in results]

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.waiting.pop(0)


def test_the_rule_takes_rounding_and_nothing_coarser(parts: dict[str, tuple[Component, list[Sample]]]) -> None:
    component, samples = parts["mask_head"]
    rounding = reduced(component, PteTarget().numerics(HALF))
    assert rounding is not None
    results = [rounding(sample.inputs) for sample in samples]
    for factor, passed in ((1.0, True), (1.05, False)):
        records = verify_component(component, partial(Fixed, results, factor), samples, rounding)
        assert [record.passed for record in records] == [passed] * len(records)


def test_float32_is_no_reduced_precision(parts: dict[str, tuple[Component, list[Sample]]]) -> None:
    assert reduced(parts["decoder"][0], PteTarget().numerics(PteOptions())) is None


def test_emulated_sums_in_float16_keep_what_a_mask_hides(parts: dict[str, tuple[Component, list[Sample]]]) -> None:
    """torch's multi-head attention begins its scores with the mask, and rounding minus infinity in halves gave NaN."""
    component, samples = parts["decoder"]
    for sample in samples:
        with eager_in("fp16", half_sums=True):
            got = component.eager(sample.inputs)
        for name, value in got.items():
            assert sample.expected is not None
            assert bool(value.isfinite().all()) and torch.allclose(value, sample.expected[name], atol=0.03), name


def _convolution(transposed: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    shape = (64, 8, 2, 2) if transposed else (8, 64, 3, 3)
    source = torch.randn(2, 64, 9, 9, generator=generator).half().float()
    weight, bias = (torch.randn(size, generator=generator).half().float() for size in (shape, (8,)))
    stride, padding = ([2, 2], [0, 0]) if transposed else ([1, 1], [1, 1])
    return source, weight, bias, stride, padding, [1, 1], transposed, [0, 0], 1


@pytest.mark.parametrize("transposed", [False, True])
def test_sums_of_a_convolution_in_float16_are_as_far_off_as_term_by_term(transposed: bool) -> None:
    """Against a sum that is rounded after every single term, one channel and one tap of the window at a time."""
    source, weight, bias, *how = _convolution(transposed)
    right = exact(source.double(), weight.double(), bias.double(), *how)
    total = bias.half()[None, :, None, None].expand(right.shape).clone()
    for channel in range(64):
        for tap in range(weight[0, 0].numel()):
            single = torch.zeros_like(weight)
            at = (channel, slice(None)) if transposed else (slice(None), channel)
            single[at].flatten(1)[:, tap] = weight[at].flatten(1)[:, tap]
            total += exact(source, single, None, *how).half()
    mine, kept = (half_summed(source, weight, bias, *how) - right).norm(), (total - right).norm()
    assert 0.5 < mine / kept < 2 and kept > 20 * (exact(source, weight, bias, *how).half() - right).norm() / 10


def test_a_depth_wise_convolution_sums_in_float32() -> None:
    source, weight = torch.randn(1, 4, 6, 6), torch.randn(4, 1, 3, 3)
    how = (source, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 4)
    assert torch.equal(half_summed(*how), exact(*how))


def test_a_pipeline_left_unverified_is_completed_by_verify(tiny_model: nn.Module, tmp_path: Path) -> None:
    """As that of engines is, on a machine with their GPU."""
    out, source = tmp_path / "out", module_image_source(tiny_model)
    export_pipeline(source, output=out, components=["text_encoder"], verify="off")
    before = load_manifest(out)
    assert not before.verified and before.verified_reason and not before.components[0].verification
    records = verify_pipeline(out, source)
    after = load_manifest(out)
    assert after.verified and after.verified_reason is None and after.components[0].verification == tuple(records)
    assert after.files == before.files
    (out / "manifest.json").write_text(sealed(after))  # and what is verified is left as it is
    stamp = (out / "manifest.json").stat().st_mtime_ns
    verify_pipeline(out, source)
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
