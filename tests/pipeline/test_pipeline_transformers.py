"""transformers' Sam3Model and Sam3LiteTextModel through the exported pipeline, against their own processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sam3x.errors import SourceError
from sam3x.pipeline.export import export_pipeline
from sam3x.pipeline.request import PROMPTS
from sam3x.runtime import Segmenter
from sam3x.sources.image import module_image_source, transformers_image_source
from sam3x.sources.names import DETECTOR
from sam3x.sources.transformers.source import transformers_model
from sam3x.spec import make_spec
from support.folders import MadeOnce
from support.image_model import between, iou, photograph
from support.transformers_model import SIZE, tiny


@pytest.fixture(scope="module", params=["Sam3Model", pytest.param("Sam3LiteTextModel", marks=pytest.mark.long)])
def source(request: pytest.FixtureRequest, made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model, and what runs its export: once from a folder, once live and fused."""
    model = tiny(request.param)

    def write(folder: Path) -> None:
        if request.param == "Sam3LiteTextModel":
            export_pipeline(module_image_source(model), output=folder, fuse=True)
        else:
            saved = tmp_path_factory.mktemp("saved")
            model.save_pretrained(saved)
            export_pipeline(transformers_image_source(saved), output=folder)

    return model, Segmenter(made_once(request.param, write))


def reference(
    model: nn.Module, picture: Image.Image, ids: list[int], boxes: list[list[float]], threshold: float, pad_to: int
) -> dict[str, np.ndarray]:
    """What transformers gives: its image processor, its model on padded text, its post-processing."""
    from transformers.models.sam3.image_processing_sam3 import Sam3ImageProcessor

    processor = Sam3ImageProcessor(size={"height": SIZE, "width": SIZE})
    width, height = picture.size
    given: dict[str, Any] = {}
    if boxes:
        box = torch.tensor([boxes])
        scale = torch.tensor([width, height, width, height])
        given["input_boxes"] = torch.cat([(box[..., :2] + box[..., 2:]) / 2, box[..., 2:] - box[..., :2]], dim=-1) / scale
        given["input_boxes_labels"] = torch.ones((1, len(boxes)), dtype=torch.long)
    mask = torch.tensor([[1] * len(ids) + [0] * (pad_to - len(ids))])
    with torch.no_grad():
        out = model(
            pixel_values=processor(picture, return_tensors="pt")["pixel_values"],
            input_ids=torch.tensor([ids + [1] * (pad_to - len(ids))]),
            attention_mask=mask,
            **given,
        )
    (found,) = processor.post_process_instance_segmentation(out, threshold=threshold, target_sizes=[(height, width)])
    return {name: value.numpy() for name, value in found.items()}


IDS, OTHERS = [598, 17, 230, 599], [598, 5, 77, 300, 12, 44, 599]
BOX = [60.0, 80.0, 300.0, 390.0]


@pytest.mark.parametrize(
    ("ids", "boxes"), [(IDS, []), (OTHERS, []), (IDS, [BOX]), (OTHERS, [BOX, [350.0, 20.0, 620.0, 200.0]])]
)
def test_the_same_detections_as_transformers(
    ids: list[int], boxes: list[list[float]], source: tuple[nn.Module, Segmenter]
) -> None:
    model, segmenter = source
    picture = photograph()
    every = reference(model, picture, ids, boxes, 0.0, 12)["scores"]
    threshold = between(every)
    wanted = reference(model, picture, ids, boxes, threshold, 12)
    found = segmenter.segment(picture, [ids], boxes or None, threshold=threshold)
    assert 0 < len(found) == len(wanted["scores"]) < len(every)
    np.testing.assert_allclose(found.scores, wanted["scores"], atol=1e-5)
    np.testing.assert_allclose(found.boxes, wanted["boxes"], atol=5e-3)  # pixels
    assert all(iou(mine, theirs.astype(bool)) >= 0.999 for mine, theirs in zip(found.masks, wanted["masks"], strict=True))
    assert len(segmenter.segment(picture, [ids], boxes or None, threshold=0.9999)) == 0


def test_texts_of_different_lengths_and_boxes_in_one_pass(source: tuple[nn.Module, Segmenter]) -> None:
    _, segmenter = source
    image = segmenter.encode(photograph())
    together = segmenter.segment(image, [IDS, OTHERS, IDS], [[], [BOX], [BOX]], threshold=0.0)
    for index, (ids, boxes) in enumerate([(IDS, []), (OTHERS, [BOX]), (IDS, [BOX])]):
        alone = segmenter.segment(image, [ids], boxes or None, threshold=0.0)
        np.testing.assert_allclose(together.scores[together.prompt == index], alone.scores, atol=1e-5)


def test_every_component_is_close_to_eager(source: tuple[nn.Module, Segmenter]) -> None:
    manifest = source[1].manifest
    assert manifest.source == "transformers" and manifest.verified and manifest.threshold == 0.3
    parts = DETECTOR if not manifest.fused else ("vision_encoder", "text_encoder", "segmenter")
    assert tuple(item.name for item in manifest.components) == parts
    assert all(record.max_rel < 2e-5 for item in manifest.components for record in item.verification)
    assert manifest.fixed_length == ("LiteText" in manifest.origin)


def test_folders_that_hold_no_such_model(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "gpt2"}')
    for folder, fact in ((tmp_path, "no config.json"), (tmp_path / "odd", "odd")):
        with pytest.raises(SourceError, match=fact):
            export_pipeline(transformers_image_source(folder), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def sam3_model() -> nn.Module:
    return tiny("Sam3Model")


VOCABULARY = json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<pad>": 7, "dog": 2}, "unk_token": "dog"}})
PAD = {"content": "<pad>", "lstrip": False}


@pytest.mark.parametrize(
    ("files", "pad_id"),
    [
        ({}, 1),  # the text encoder's own
        ({"tokenizer_config.json": '{"pad_token": "<pad>"}'}, 1),
        ({"tokenizer.json": VOCABULARY}, 1),
        ({"tokenizer.json": VOCABULARY, "tokenizer_config.json": '{"pad_token": null}'}, 1),
        ({"tokenizer.json": VOCABULARY, "tokenizer_config.json": '{"pad_token": "<none>"}'}, 1),
        ({"tokenizer.json": VOCABULARY, "tokenizer_config.json": '{"pad_token": "<pad>"}'}, 7),
        ({"tokenizer.json": VOCABULARY, "tokenizer_config.json": json.dumps({"pad_token": PAD})}, 7),
    ],
)
def test_texts_are_filled_up_with_the_tokenizers_own_token(
    files: dict[str, str], pad_id: int, sam3_model: nn.Module, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert transformers_model(sam3_model, "it", make_spec(**PROMPTS), tmp_path).pad_id == pad_id


@pytest.mark.parametrize(
    ("name", "text", "fact"),
    [
        ("tokenizer_config.json", "{", "JSONDecodeError"),
        ("tokenizer_config.json", "[]", "no object"),
        ("tokenizer_config.json", '{"pad_token": 3}', "its pad_token is 3"),
        ("tokenizer_config.json", "[" * 100_000, "RecursionError"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1", "Exception"),
    ],
    ids=["no JSON", "no object", "no text", "nested too deep", "a pointer"],
)
def test_a_tokenizer_that_cannot_be_read_is_told(
    name: str, text: str, fact: str, sam3_model: nn.Module, tmp_path: Path
) -> None:
    files = {"tokenizer.json": VOCABULARY, "tokenizer_config.json": '{"pad_token": "<pad>"}', name: text}
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    with pytest.raises(SourceError, match=rf"step 1/4 source: .*/{name} cannot be read .*{fact}.*--tokenizer"):
        transformers_model(sam3_model, "it", make_spec(**PROMPTS), tmp_path)


def test_convolutions_with_batch_norms_are_stored_in_int8_too(tmp_path: Path) -> None:
    given = module_image_source(tiny("Sam3LiteTextModel"))
    manifest = export_pipeline(given, output=tmp_path / "out", components=["text_encoder"], weights="int8")
    metadata = manifest.components[0].metadata
    assert manifest.verified and metadata["narrow_tensors"] >= 16 and metadata["float32_bytes"] < 0.2 * metadata["narrow_bytes"]
