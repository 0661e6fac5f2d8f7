"""Prompts and settings as people give them: a right answer or one sentence."""

from __future__ import annotations

import pickle
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sam3x.errors import ArtifactError, SpecError, TargetUnavailableError
from sam3x.runtime import EncodedImage, Result, Segmenter
from sam3x.runtime.prompts import boxes_to_fractions

SIZE = (40, 30)
BOX, OTHER = [2.0, 3.0, 20.0, 25.0], [10.0, 0.0, 39.0, 12.0]


@pytest.fixture(scope="module")
def segmenter(tiny_pipeline: Path) -> Segmenter:
    return Segmenter(tiny_pipeline, threads=1)


@pytest.fixture(scope="module")
def encoded(segmenter: Segmenter) -> EncodedImage:
    return segmenter.encode(np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8))


def same(left: Result, right: Result) -> None:
    assert left.prompts == right.prompts
    np.testing.assert_array_equal(left.prompt, right.prompt)
    np.testing.assert_allclose(left.scores, right.scores, atol=1e-6)
    np.testing.assert_array_equal(left.masks, right.masks)


FACTS: list[tuple[str, dict[str, Any]]] = [
    ("a label is True", {"boxes": [BOX], "labels": [-1]}),
    ("a label is True", {"boxes": [BOX], "labels": [2]}),
    ("a label is True", {"boxes": [BOX], "labels": [None]}),
    ("a label is True", {"boxes": [BOX], "labels": ["yes"]}),
    ("a label is True", {"boxes": [BOX], "labels": [1.0]}),
    ("a list for each list, got True", {"text": ["a", "b"], "boxes": [[BOX], [BOX]], "labels": [True, True]}),
    ("1 lists of labels for 2 lists", {"text": ["a", "b"], "boxes": [[BOX], [BOX]], "labels": [[True]]}),
    ("2 labels for 1 boxes", {"boxes": [BOX], "labels": [True, False]}),
    ("1 labels for 0 boxes", {"text": "a", "labels": [True]}),
    ("listed as the boxes are", {"boxes": [BOX], "labels": True}),
    ("a number from 0 to 1, got nan", {"text": "a", "threshold": float("nan")}),
    ("a number from 0 to 1, got -0.1", {"text": "a", "threshold": -0.1}),
    ("a number from 0 to 1, got '0.5'", {"text": "a", "threshold": "0.5"}),
    ("a number from 0 to 1, got True", {"text": "a", "threshold": True}),
    ("a number from 0 to 1, got None", {"text": ["a", "b"], "threshold": [0.5, None]}),
    ("2 thresholds for 1 prompts", {"text": "a", "threshold": [0.5, 0.5]}),
    ("0 thresholds for 1 prompts", {"text": "a", "threshold": []}),
    ("a threshold is a number", {"text": "a", "threshold": {0.5: 1}}),
    ("outside the picture, which is 40 x 30", {"boxes": [[50, 3, 60, 9]]}),
    ("outside the picture", {"boxes": [[-9, 3, 0, 9]]}),
    ("reaches further over the edge", {"boxes": [[0, 0, 3e38, 3e38]]}),
    ("x0 < x1", {"boxes": [[0, 0, float("inf"), 9]]}),
    ("x0 < x1", {"boxes": [[0, 0, float("nan"), 9]]}),
    ("x0 < x1", {"boxes": [[20, 3, 2, 9]]}),
    ("x0 < x1", {"boxes": [[2, 3, 2, 9]]}),
    ("too thin", {"boxes": [[1e-45, 3, 2e-45, 9]]}),
    ("four numbers", {"boxes": BOX}),
    ("four numbers", {"boxes": [["1", "2", "3", "4"]]}),
    ("four numbers", {"boxes": [[[BOX]]]}),
    ("four numbers", {"boxes": [[1, 2, 3, None]]}),
    ("four numbers", {"boxes": [[1, 2, 3, 10**400]]}),
    ("four numbers", {"boxes": [[[]]]}),
    ("boxes are a list", {"boxes": 3}),
    ("boxes are a list", {"boxes": "1,2,3,4"}),
    ("in a list of their own and some do not", {"boxes": [BOX, [OTHER]]}),
    ("prompt 2 of 2 has neither", {"boxes": [[BOX], []]}),
    ("nothing to look for", {"boxes": [[], []]}),
    ("text is words or token ids", {"text": 3}),
    ("text is words or token ids", {"text": b"dog"}),
    ("text is words or token ids", {"text": {"dog": 1}}),
    ("each text is words", {"text": ["dog", None]}),
    ("each text is words", {"text": [1, "dog"]}),
    ("token ids are whole numbers", {"text": [[1.5, 2]]}),
    ("token ids are whole numbers", {"text": [[True, 2]]}),
    ("token ids below 530, got .-1", {"text": [[-1]]}),
    ("1 to 16 token ids", {"text": [[]]}),
    ("surrogate", {"text": "\ud800"}),
    ("max_detections is a whole number from 1, got 0", {"text": "a", "max_detections": 0}),
    ("max_detections is a whole number from 1, got 2.5", {"text": "a", "max_detections": 2.5}),
]


@pytest.mark.parametrize(("fact", "asked"), FACTS)
def test_labels_boxes_texts_and_thresholds_of_another_kind_are_told(
    fact: str, asked: dict[str, Any], segmenter: Segmenter, encoded: EncodedImage
) -> None:
    with pytest.raises(SpecError, match=fact):
        segmenter.segment(encoded, **asked)


def test_prompts_are_checked_before_the_picture_is_read(segmenter: Segmenter) -> None:
    with pytest.raises(SpecError, match="a label is True"):
        segmenter.segment("nowhere.png", boxes=[BOX], labels=[2])


def test_other_types_of_the_same_values_are_the_same_prompt(segmenter: Segmenter, encoded: EncodedImage) -> None:
    wanted = segmenter.segment(encoded, [[1, 7, 9]], [BOX, OTHER], [True, False], threshold=0.0)
    for text, boxes, labels, threshold in (
        ([1, 7, 9], np.array([BOX, OTHER]), [1, 0], np.float32(0)),
        (np.array([1, 7, 9]), torch.tensor([BOX, OTHER]), torch.tensor([True, False]), torch.tensor(0.0)),
        (torch.tensor([[1, 7, 9]]), [[BOX, OTHER]], [[np.True_, np.False_]], [Fraction(0)]),
        ((np.int64(1), torch.tensor(7), 9), (tuple(BOX), np.array(OTHER, dtype=np.float16)), np.array([1, 0]), np.zeros(1)),
        (iter([[1, 7, 9]]), iter([BOX, OTHER]), iter([True, False]), None if segmenter.manifest.threshold == 0 else 0),
    ):
        same(segmenter.segment(encoded, text, boxes, labels, threshold), wanted)


def test_a_threshold_for_each_prompt_and_a_cap_on_detections(segmenter: Segmenter, encoded: EncodedImage) -> None:
    every = segmenter.segment(encoded, ["dog", "car"], threshold=0.0)
    scores = [every.scores[every.prompt == index] for index in range(2)]
    limits = [float(np.sort(own)[-3]) for own in scores]  # two of each are above
    found = segmenter.segment(encoded, ["dog", "car"], threshold=limits)
    capped = segmenter.segment(encoded, ["dog", "car"], threshold=0.0, max_detections=2)
    same(found, capped)
    assert found.prompt.tolist() == [0, 0, 1, 1]
    for index in range(2):
        best = np.sort(np.argsort(-scores[index])[:2])
        np.testing.assert_allclose(found.scores[found.prompt == index], scores[index][best], atol=1e-6)
    assert len(segmenter.segment(encoded, ["dog", "car"], threshold=[1.0, 0.0])) == len(scores[1])


def test_run_filters_at_the_models_own_threshold(segmenter: Segmenter, encoded: EncodedImage) -> None:
    assert {item.threshold for item in segmenter.prompts(["dog", "car"])} == {segmenter.manifest.threshold}


def test_an_encoded_image_of_another_pipeline_is_refused(segmenter: Segmenter, encoded: EncodedImage) -> None:
    for other in (
        replace(encoded, weights_sha256="0" * 64),
        replace(encoded, tensors={}),
        replace(encoded, tensors={**encoded.tensors, "image_tokens": encoded.tensors["image_tokens"][:, :9]}),
        replace(encoded, tensors={**encoded.tensors, "fpn_0": encoded.tensors["fpn_0"].astype(np.float64)}),
    ):
        with pytest.raises(SpecError, match="made by a pipeline of other weights"):
            segmenter.segment(other, "dog")
    same(
        segmenter.segment(pickle.loads(pickle.dumps(encoded)), "dog", threshold=0),
        segmenter.segment(encoded, "dog", threshold=0),
    )


def test_a_box_may_reach_over_the_edge() -> None:
    found = boxes_to_fractions(np.array([[-10.0, -5.0, 50.0, 20.0]]), 30, 40)
    np.testing.assert_allclose(found, [[0.5, 0.25, 1.5, 25 / 30]], rtol=1e-6)


NUMBERS = st.one_of(st.floats(), st.integers(-3, 60), st.sampled_from([3e38, -1e308, 10**400, True, None, "7"]))
BOXES = st.lists(st.lists(st.one_of(st.floats(0, 60), NUMBERS), min_size=3, max_size=5), max_size=3)
GOOD = st.sampled_from([BOX, OTHER])
ODD = st.one_of(st.none(), st.booleans(), st.integers(-2, 3), st.floats(), st.text(max_size=4), st.binary(max_size=3))
ASKED = st.fixed_dictionaries(
    {},
    optional={
        "text": st.one_of(
            st.text(max_size=8),
            st.lists(st.text(max_size=4), max_size=3),
            st.lists(st.lists(st.integers(-1, 540), max_size=4)),
            ODD,
        ),
        "boxes": st.one_of(
            st.lists(GOOD, max_size=3), st.lists(st.lists(GOOD, max_size=2), max_size=3), BOXES, st.lists(BOXES), ODD
        ),
        "labels": st.one_of(
            st.lists(st.booleans(), max_size=3), st.lists(st.lists(ODD, max_size=2), max_size=3), st.lists(ODD), ODD
        ),
        "threshold": st.one_of(st.floats(0, 1), st.lists(st.floats(0, 1), max_size=3), st.lists(NUMBERS, max_size=3), ODD),
        "max_detections": st.one_of(st.none(), st.integers(-1, 3), ODD),
    },
)


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(ASKED)
def test_whatever_is_asked_has_an_answer_or_a_spec_error(
    segmenter: Segmenter, encoded: EncodedImage, asked: dict[str, Any]
) -> None:
    try:
        found = segmenter.segment(encoded, **asked)
    except SpecError as error:
        assert str(error).startswith("run: ")
        return
    assert len(found.boxes) == len(found.scores) == len(found.prompt) == len(found.small_masks)
    assert np.isfinite(found.scores).all() and np.isfinite(found.boxes).all() and np.isfinite(found.small_masks).all()


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"folder": 3}, "is a path, got 3"),
        ({"folder": b"out"}, "is a path"),
        ({"folder": "a\0b"}, "is a path"),
        ({"batch": 0}, "batch is a whole number from 1, got 0"),
        ({"batch": "4"}, "batch is a whole number from 1"),
        ({"max_pixels": 0.5}, "max_pixels is a whole number from 1"),
        ({"threads": 0}, "threads is a whole number from 1"),
        ({"threads": True}, "threads is a whole number from 1"),
        ({"providers": []}, "providers is a list"),
        ({"providers": 3}, "providers is a list"),
        ({"providers": [3]}, "a provider is a name"),
        ({"providers": [("cpu", 3)]}, "a provider is a name"),
        ({"providers": "cdua"}, "no provider 'cdua'. Did you mean 'cuda'?"),
    ],
)
def test_settings_of_another_kind_are_told(options: dict[str, Any], fact: str, tiny_pipeline: Path) -> None:
    with pytest.raises(SpecError, match=fact.replace("?", r"\?")):
        Segmenter(**{"folder": tiny_pipeline, **options})


def test_a_missing_provider_is_one_sentence_with_the_package_that_brings_it(tiny_pipeline: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    for name in ("cuda", "CUDAExecutionProvider", ["cuda", "cpu"], [("CUDA", {"device_id": 0})]):
        with pytest.raises(TargetUnavailableError, match=r"without CUDAExecutionProvider.*pip install onnxruntime-gpu"):
            Segmenter(tiny_pipeline, providers=name)


def test_threads_and_providers_reach_every_session(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    opened: list[tuple[int, list[Any]]] = []
    make = onnxruntime.InferenceSession

    def session(path: str, options: Any, providers: list[Any]) -> Any:
        opened.append((options.intra_op_num_threads, providers))
        return make(path, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    Segmenter(tiny_pipeline, threads=2, providers=[("cpu", {"use_arena": 0})]).segment(
        np.zeros((4, 4), np.uint8), "dog", threshold=0
    )
    assert opened == [(2, [("CPUExecutionProvider", {"use_arena": 0})])] * 6


def test_a_segmenter_is_a_context_manager(tiny_pipeline: Path) -> None:
    with Segmenter(tiny_pipeline, check=False) as segmenter:
        image = segmenter.encode(np.zeros((4, 4), np.uint8))
    for call in (lambda: segmenter.encode(np.zeros((4, 4), np.uint8)), lambda: segmenter.segment(image, "dog")):
        with pytest.raises(ArtifactError, match="the Segmenter is closed"):
            call()


def test_a_segmenter_pickles_by_its_folder(
    segmenter: Segmenter, encoded: EncodedImage, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_pipeline.parent)
    data = pickle.dumps(Segmenter(tiny_pipeline.name, threads=1, batch=2))
    assert len(data) < 1000
    monkeypatch.chdir(tmp_path)
    other = pickle.loads(data)
    assert other.batch == 2
    same(other.segment(encoded, "dog", threshold=0), segmenter.segment(encoded, "dog", threshold=0))


def test_a_file_that_cannot_be_opened_is_told(tiny_pipeline: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_pipeline, tmp_path / "copy")
    (tmp_path / "copy" / "vision_encoder.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=r"load: vision_encoder\.onnx cannot be opened"):
        Segmenter(tmp_path / "copy", check=False).encode(np.zeros((4, 4), np.uint8))
