"""Meta's image model through the exported pipeline: the same detections from picture and words as upstream's processor."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from torch import nn

from sam3x.artifact.artifact import load
from sam3x.errors import ArtifactError, SpecError
from sam3x.pipeline import module_image_source, verify_pipeline
from sam3x.runtime import EncodedImage, Segmenter
from sam3x.runtime.manifest import load_manifest
from sam3x.sources.names import COMPONENTS
from support.folders import write_export
from support.image_model import between, iou, processor_result, tiny_image_model


def test_every_component_is_within_1e_4_of_eager(tiny_pipeline: Path) -> None:
    manifest = load_manifest(tiny_pipeline)
    assert tuple(item.name for item in manifest.components) == COMPONENTS and manifest.verified
    assert {path.name for path in tiny_pipeline.iterdir() if not path.name.startswith(".")} == {
        *manifest.files,
        "manifest.json",
    }
    for item in manifest.components:
        assert len(item.verification) >= len(item.outputs)
        assert all(record.passed and record.max_rel < 1e-5 for record in item.verification), item.name


BOX, OTHER = [60.0, 80.0, 300.0, 390.0], [350.0, 20.0, 620.0, 200.0]
PROMPTS: dict[str, dict[str, Any]] = {
    "text": {"text": "the red dog"},
    "box": {"text": None, "boxes": [BOX]},
    "two boxes, one negative": {"text": None, "boxes": [BOX, OTHER], "labels": [True, False]},
    "text and box": {"text": "the car", "boxes": [OTHER]},
    "no hit": {"text": "the red dog", "threshold": 0.999},
    "every query": {"text": "dog &amp; “car”", "threshold": 0.0},
}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_same_detections_as_upstreams_processor(
    name: str, tiny_model: nn.Module, picture: Image.Image, segmenter: Segmenter, encoded: EncodedImage
) -> None:
    prompt = PROMPTS[name]
    if "threshold" not in prompt:
        every = processor_result(tiny_model, picture, **prompt, threshold=0.0)["scores"]
        prompt = {**prompt, "threshold": between(every)}
    wanted = processor_result(tiny_model, picture, **prompt)
    found = segmenter.segment(encoded, **prompt)
    assert len(found) == len(wanted["scores"]) and (len(found) == 0) == (name == "no hit")
    np.testing.assert_allclose(found.scores, wanted["scores"], atol=1e-5)
    np.testing.assert_allclose(found.boxes, wanted["boxes"], atol=5e-3)  # pixels
    assert found.masks.shape == wanted["masks"].shape and found.masks.dtype == bool
    assert all(iou(mine, theirs) >= 0.999 for mine, theirs in zip(found.masks, wanted["masks"], strict=True))


def test_the_picture_is_prepared_as_upstream_prepares_it(
    tiny_model: nn.Module, picture: Image.Image, segmenter: Segmenter
) -> None:
    from sam3x.runtime.pictures import to_tensor

    wanted = processor_result(tiny_model, picture, "dog")["image"]
    got = to_tensor(picture, 112, segmenter.manifest.mean, segmenter.manifest.std)[0]
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_many_prompts_in_one_pass_are_each_as_if_alone(segmenter: Segmenter, encoded: EncodedImage) -> None:
    texts = ["dog", "the red car", "and", "visual", "a", "the the the the the"]
    boxes = [[BOX], [], [OTHER, BOX], [], [BOX], []]
    together = segmenter.segment(encoded, texts, boxes, threshold=0.0)
    assert together.prompts == tuple(texts)
    for index, (text, own) in enumerate(zip(texts, boxes, strict=True)):
        alone = segmenter.segment(encoded, text, own or None, threshold=0.0)
        rows = together.prompt == index
        np.testing.assert_allclose(together.scores[rows], alone.scores, atol=1e-5)
        assert all(iou(a, b) >= 0.999 for a, b in zip(together.masks[rows], alone.masks, strict=True))


RUN = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "transformers", "sam3", "onnx"}:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Blocked())
from sam3x.cli.app import main
main()
"""


def test_run_needs_no_torch_and_writes_picture_and_json(tiny_pipeline: Path, picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "photo.png")
    options = [
        "--text",
        "dog",
        "--text",
        "the red car",
        "--box",
        "60,80,300,390",
        "--not-box",
        "350,20,620,200",
        "--threshold",
        "0.1",
    ]
    written = ["--threshold", "0.1", "-o", "drawn.png", "--json", "found.json"]
    command = [sys.executable, "-c", RUN, "run", str(tiny_pipeline), "photo.png", *options, *written]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["prompts"] == ["dog", "the red car"] and (found["width"], found["height"]) == picture.size
    segmenter = Segmenter(tiny_pipeline)
    wanted = segmenter.segment(picture, ["dog", "the red car"], [BOX, OTHER], [True, False], threshold=0.1)
    assert len(found["detections"]) == len(wanted) > 0 and f"{len(wanted)} found" in done.stdout
    for item, mask, box, score in zip(found["detections"], wanted.masks, wanted.boxes, wanted.scores, strict=True):
        flat = np.repeat(np.arange(len(item["mask"]["counts"])) % 2 == 1, item["mask"]["counts"])
        np.testing.assert_array_equal(flat.reshape(item["mask"]["size"], order="F"), mask)
        np.testing.assert_allclose(item["box"], box, atol=1e-2)
        assert item["score"] == pytest.approx(float(score), abs=1e-5)
    drawn = np.asarray(Image.open(tmp_path / "drawn.png").convert("RGB"))
    assert drawn.shape == (427, 640, 3) and (drawn != np.asarray(picture)).any()


def test_the_tokenizer_is_upstreams(tiny_model: nn.Module, segmenter: Segmenter) -> None:
    texts = [
        "The  Dog",
        "a red-car, and 42 cats!",
        "naïve café — “thé”",
        "it's &amp;lt;b&gt; don't",
        "犬 the dog",
        "",
        " ".join(["dog"] * 40),
    ]
    for text in texts:
        wanted = tiny_model.backbone.language_backbone.tokenizer([text], context_length=16)[0].tolist()
        got = segmenter.tokenizer(text)
        assert got == wanted[: len(got)] and not any(wanted[len(got) :]), text


@pytest.mark.parametrize(
    ("given", "fact"),
    [
        ({}, "nothing to look for"),
        ({"text": []}, "list of texts is empty"),
        ({"boxes": [[5, 5, 2, 9]]}, "x0 < x1"),
        ({"boxes": [[5, 5, 9]]}, "four numbers"),
        ({"text": ["a", "b"], "boxes": [[[1, 2, 3, 4]]]}, "1 lists of boxes for 2 texts"),
        ({"boxes": [[1, 2, 3, 4]], "labels": [True, False]}, "2 labels for 1 boxes"),
        ({"boxes": [[1, 2, 3, 4]] * 65}, "at most 64"),
        ({"text": [[7, 9999]]}, "token ids below 530"),
    ],
)
def test_bad_prompts_get_one_sentence(given: dict[str, Any], fact: str, segmenter: Segmenter, encoded: EncodedImage) -> None:
    with pytest.raises(SpecError, match=fact):
        segmenter.segment(encoded, **given)


def test_pictures_that_are_none(segmenter: Segmenter, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    for given in (tmp_path / "text.jpg", tmp_path / "none.jpg", tmp_path, np.zeros((4, 4, 2), dtype=np.uint8)):
        with pytest.raises(SpecError, match="run: "):
            segmenter.encode(given)


def test_a_photo_is_turned_as_its_exif_says(segmenter: Segmenter, picture: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    assert segmenter.encode(tmp_path / "turned.png").picture.size == (427, 640)


def test_a_picture_is_encoded_once_for_many_prompts(segmenter: Segmenter, picture: Image.Image) -> None:
    calls: list[str] = []
    components = segmenter._components
    run = components.run
    with mock.patch.object(components, "run", lambda name, tensors: calls.append(name) or run(name, tensors)):
        image = segmenter.encode(picture)
        segmenter.segment(image, ["dog", "car"])
        segmenter.segment(image, "and", threshold=0.999)
    assert calls.count("vision_encoder") == 1 and calls.count("decoder") == 2


def test_verify_runs_the_components_against_the_source_again(
    tiny_pipeline: Path, tiny_model: nn.Module, tiny_vocabulary: Path
) -> None:
    records = verify_pipeline(tiny_pipeline, module_image_source(tiny_model), full=True)
    assert {record.output for record in records} >= {"fpn_0", "text_features", "prompt", "pred_boxes", "pred_masks"}
    assert {record.output for record in records} >= {"image_embed", "low_res_masks", "iou_predictions"}
    assert len({record.case for record in records if "objects" not in record.case}) == 3
    with pytest.raises(ArtifactError, match="other weights"):
        verify_pipeline(tiny_pipeline, module_image_source(tiny_image_model(tiny_vocabulary, seed=6)))


def test_a_damaged_or_other_folder_is_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_export(tmp_path / "other", {"fusion_encoder.onnx": b"graph"})
    with pytest.raises(ArtifactError, match="holds no pipeline"):
        Segmenter(tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"holds a whole image model. Run it with sam3x run"):
        load(tiny_pipeline)
    with pytest.raises(ArtifactError, match="cannot be read"):
        Segmenter(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_pipeline, copy)
    with (copy / "decoder.onnx").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ArtifactError, match=r"decoder\.onnx was changed"):
        Segmenter(copy)
    (copy / "decoder.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"decoder\.onnx is missing"):
        Segmenter(copy)
