"""Masks are small until they are asked for, and leave as arrays, run lengths, PNG and COCO annotations."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from sam3x.errors import ArtifactError, SpecError
from sam3x.runtime import CocoFile, Result, Segmenter
from sam3x.runtime import result as result_module
from sam3x.runtime.output import run_lengths


def made(height: int = 41, width: int = 60, count: int = 3, border: float = 0.0) -> Result:
    draw = np.random.default_rng(3)
    small = draw.standard_normal((count, 8, 8)).astype(np.float32) + np.float32(border)
    return Result(
        small_masks=small,
        border=border,
        boxes=np.array([[1.5, 2, 20, 30]] * count, dtype=np.float32).reshape(-1, 4),
        scores=np.linspace(0.9, 0.5, count, dtype=np.float32),
        prompt=np.arange(count) % 2,
        prompts=("dog", "red car"),
        picture=Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)),
    )


@pytest.mark.parametrize("border", [0.0, 0.5])
def test_masks_are_what_torch_stretches(border: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(result_module, "_BAND", 7 * 60)  # the last band is shorter
    found = made(border=border)
    wanted = torch.nn.functional.interpolate(torch.from_numpy(found.small_masks)[None], (41, 60), mode="bilinear")[0].numpy()
    clear = np.abs(wanted - border) > 1e-5
    assert found.masks.shape == (3, 41, 60) and found.masks.dtype == bool and found.masks is found.masks
    np.testing.assert_array_equal(found.masks[clear], (wanted > border)[clear])
    for index in (0, 2, -1):
        np.testing.assert_array_equal(found.mask(index), found.masks[index])
        assert found.area(index) == found.masks[index].sum()
    with pytest.raises(IndexError):
        found.mask(3)
    assert made(count=0).masks.shape == (0, 41, 60)


def test_finding_everything_takes_less_memory_than_one_mask(tiny_pipeline: Path) -> None:
    """6 megapixels and 24 detections: all masks are 144 MB, one is 6."""
    segmenter = Segmenter(tiny_pipeline)
    encoded = segmenter.encode(Image.new("RGB", (3000, 2000)))
    segmenter.segment(encoded, ["dog", "car"], threshold=0.0)  # opens the files
    tracemalloc.start()
    try:
        found = segmenter.segment(encoded, ["dog", "car"], threshold=0.0)
        searching = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        counts = [len(found.run_lengths(index)) for index in range(len(found))]
        one_by_one = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        masks = found.masks
        together = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert masks.nbytes == 144e6 and len(counts) == 24
    assert searching < 6e6 and one_by_one < 60e6 and together < 144e6 + 60e6


def test_masks_that_no_memory_holds_are_told() -> None:
    found = replace(made(), picture=SimpleNamespace(size=(1 << 22, 1 << 22)))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"take 52776.6 GB, more than there is"):
        _ = found.masks


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.booleans()))
def test_run_lengths_are_pycocotools(mask: np.ndarray) -> None:
    height, width = mask.shape
    mine = coco_mask.frPyObjects({"size": [height, width], "counts": run_lengths(mask).tolist()}, height, width)
    assert mine == coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def test_coco_annotations_are_read_by_pycocotools(tmp_path: Path) -> None:
    first, second = made(), made(height=30, width=20, count=2)
    file = CocoFile()
    file.add("a.jpg", first)
    file.add("b.jpg", second)
    file.write(tmp_path / "coco.json")
    read = COCO(str(tmp_path / "coco.json"))
    assert [item["file_name"] for item in read.loadImgs(read.getImgIds())] == ["a.jpg", "b.jpg"]
    assert [item["name"] for item in read.loadCats(read.getCatIds())] == ["dog", "red car"]
    for number, found in enumerate((first, second), start=1):
        own = read.loadAnns(read.getAnnIds(imgIds=[number]))
        assert [item["category_id"] - 1 for item in own] == found.prompt.tolist()
        for item, mask, score in zip(own, found.masks, found.scores, strict=True):
            np.testing.assert_array_equal(read.annToMask(item).astype(bool), mask)
            assert item["bbox"] == [1.5, 2.0, 18.5, 28.0] and item["area"] == mask.sum() and item["iscrowd"] == 0
            assert item["score"] == pytest.approx(float(score), abs=1e-6)


def test_masks_as_png_and_what_cannot_be_written(tmp_path: Path) -> None:
    found = made()
    paths = found.write_masks(tmp_path / "new" / "masks", "photo")
    assert [path.name for path in paths] == ["photo_0.png", "photo_1.png", "photo_2.png"]
    for path, mask in zip(paths, found.masks, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.where(mask, 255, 0))
    (tmp_path / "file").write_text("")
    for write in (
        lambda: found.write_masks(tmp_path / "file"),
        lambda: found.write_json(tmp_path / "none" / "found.json"),
        lambda: found.draw(tmp_path / "drawn.unknown"),
        lambda: CocoFile().write(tmp_path),
    ):
        with pytest.raises(ArtifactError, match="cannot be written"):
            write()


def test_a_drawing_blends_each_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    found = made(count=1)
    whole = np.asarray(found.draw())
    monkeypatch.setattr(result_module, "_BAND", 7 * 60)
    np.testing.assert_array_equal(np.asarray(found.draw()), whole)
    outside = ~found.masks[0]
    outside[:32, :60] = False  # the box and its label
    np.testing.assert_array_equal(whole[outside], np.asarray(found.picture)[outside])


def test_json_has_every_mask_as_run_lengths() -> None:
    found = made()
    document = json.loads(json.dumps(found.to_dict()))
    assert (document["width"], document["height"]) == (60, 41)
    for item, mask in zip(document["detections"], found.masks, strict=True):
        flat = np.repeat(np.arange(len(item["mask"]["counts"])) % 2 == 1, item["mask"]["counts"])
        np.testing.assert_array_equal(flat.reshape(item["mask"]["size"], order="F"), mask)
