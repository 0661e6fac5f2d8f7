"""The interactive head on every target that runs here: any prompts through its file and through eager, drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sam3x.capture.component import capture_component
from sam3x.capture.program import Sample, run_program
from sam3x.pipeline import export_pipeline
from sam3x.pipeline.compatibility import TARGETS, WITH_CLICKS
from sam3x.pipeline.job import ComponentJob
from sam3x.pipeline.request import resolve_pipeline
from sam3x.pipeline.samples import samples_of, settled_choice
from sam3x.runtime.clicks import Click, to_arrays
from sam3x.sources.contract import Component
from sam3x.sources.image import module_image_source, random_image_source
from sam3x.sources.names import INTERACTIVE_HEAD
from sam3x.verify.component import verify_component
from sam3x.verify.record import Runner
from support.transformers_model import tiny_tracker

SIZE, MASK = WITH_CLICKS.image_size, (32, 32)


class Graph:
    """What an engine is built from, in torch: without a GPU it is what can be run of it."""

    def __init__(self, job: ComponentJob, component: Component, sample: Sample) -> None:
        self.captured, _ = job.passes_of(job.options_of(component.name)).run(capture_component(component, sample))

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        found = run_program(self.captured.program, given, self.captured.output_names)
        return {name: value.numpy() for name, value in found.items()}


class Head:
    """The interactive head of a small model as a target's file, and what it takes of a picture."""

    def __init__(self, target: str, source: str, folder: Path) -> None:
        request = resolve_pipeline(target, TARGETS[target], components=("vision_encoder", INTERACTIVE_HEAD))
        make = random_image_source(WITH_CLICKS) if source == "meta" else module_image_source(tiny_tracker())
        model = make(request.spec).narrowed(request.components)
        samples = samples_of(model, request)[INTERACTIVE_HEAD]
        self.component: Component = model.components[-1]
        job = ComponentJob(request, folder, lambda _: None)
        runner: Runner
        if job.runs:
            made = job.export(self.component, samples)
            assert all(record.passed for record in made.verification)
            runner = job.open(made.file)
        else:
            runner = Graph(job, self.component, samples[0])
        self.open: Callable[[], Runner] = lambda: runner
        self.picture = {name: value for name, value in samples[0].inputs.items() if name.startswith(("image_", "high_"))}
        self.objects = self.component.ranges["prompts"][1]
        assert model.clicks is not None
        self.alone = model.clicks.rows_of_mask_alone


FORMS = [
    "onnx-meta",
    "onnx-transformers",
    pytest.param("pte-meta", marks=pytest.mark.long),
    pytest.param("pte-transformers", marks=pytest.mark.long),
    pytest.param("openvino-meta", marks=pytest.mark.long),
    pytest.param("trt-meta", marks=pytest.mark.long),
]


@pytest.fixture(scope="module", params=FORMS)
def head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Head:
    target, _, source = request.param.partition("-")
    return Head(target, source, tmp_path_factory.mktemp(request.param))


@st.composite
def clicks(draw: st.DrawFn) -> list[Click]:
    """One to four objects of 0 to 20 points, a box or none, a mask or none."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        numbers = np.random.default_rng(draw(st.integers(0, 2**31)))
        box, mask = draw(st.booleans()), draw(st.booleans())
        count = draw(st.integers(0 if box or mask else 1, 20))
        found.append(
            Click(
                points=numbers.uniform(0, SIZE, (count, 2)),
                labels=np.array(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)), dtype=np.int64),
                box=np.sort(numbers.uniform(0, SIZE, (2, 2)), axis=0) if box else None,
                mask=numbers.standard_normal(MASK).astype(np.float32) * 8 if mask else None,
            )
        )
    return found


def inputs_of(head: Head, objects: list[Click]) -> dict[str, Tensor]:
    arrays = to_arrays(objects[: head.objects], (SIZE, SIZE), SIZE, MASK, head.alone)
    return head.component.feed({**{name: torch.from_numpy(value) for name, value in arrays.items()}, **head.picture})


@given(objects=clicks())
@settings(max_examples=25, deadline=None)
def test_any_prompts_give_what_eager_gives(objects: list[Click], head: Head) -> None:
    inputs = inputs_of(head, objects)
    expected = head.component.eager(inputs)
    if not settled_choice(head.component, inputs, expected):
        return  # rounding decides which mask is the single one
    (record, *others) = verify_component(head.component, head.open, [Sample(branch="fixed", case="drawn", inputs=inputs)])
    assert record.passed and all(item.passed for item in others), (record, others)


@given(objects=clicks())
@settings(max_examples=10, deadline=None)
def test_an_object_is_answered_as_if_alone(objects: list[Click], head: Head) -> None:
    """Rows of padding have no part in anything, whatever stands in them."""
    inputs = inputs_of(head, objects)
    together = head.component.eager(inputs)
    alone = head.component.eager(inputs_of(head, objects[:1]))
    for name, value in alone.items():  # the three masks; the single one is a choice of them
        torch.testing.assert_close(together[name][:1, 1:], value[:, 1:], atol=1e-5 * float(value.abs().max()), rtol=0)


def test_a_head_in_half_precision_is_as_near_as_rounding(tmp_path: Path) -> None:
    """Its table of positions is read in float16 for points and in float32 for the picture."""
    options: dict[str, Any] = {"components": [INTERACTIVE_HEAD], "precision": "fp16"}
    manifest = export_pipeline(random_image_source(WITH_CLICKS), output=tmp_path / "out", **options)
    (item,) = manifest.components
    assert manifest.verified and all(1e-6 < record.max_rel < 1e-2 for record in item.verification)


@pytest.mark.long
@pytest.mark.parametrize(("precision", "least", "most"), [("fp16", 1e-4, 2e-2), ("int8", 1e-3, 0.1)])
def test_a_head_for_a_phone_in_a_lower_precision(precision: str, least: float, most: float, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target": "pte", "components": [INTERACTIVE_HEAD], "precision": precision}
    manifest = export_pipeline(random_image_source(WITH_CLICKS), output=tmp_path / "out", **options)
    (item,) = manifest.components
    assert manifest.verified and least < max(record.max_rel for record in item.verification) < most
    assert item.metadata["delegated_flops"] > 0.99


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_engine_of_the_head_is_built_and_says_that_it_was_not_run(precision: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target": "trt", "components": [INTERACTIVE_HEAD], "precision": precision, **TARGETS["trt"]}
    manifest = export_pipeline(random_image_source(WITH_CLICKS), output=tmp_path / "out", **options)
    (item,) = manifest.components
    assert item.metadata["engines"] == 1 and item.metadata["left_to_torch"] == 0
    assert not manifest.verified and "GPU" in str(manifest.verified_reason)
