"""Annotations as people have them: several ways to write a mask, and what is refused before anything is measured."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sam3x.errors import SpecError
from sam3x.fidelity.annotations import read_annotations
from sam3x.fidelity.cases import Case, coco_cases
from sam3x.fidelity.score import Answers, encode, score, tools

HEIGHT, WIDTH = 40, 60
SQUARE = np.zeros((HEIGHT, WIDTH), dtype=bool)
SQUARE[:10, :10] = True
CORNERS = [[0, 0, 10, 0, 10, 10, 0, 10]]
RUNS = [0, 10, *[30, 10] * 9, 30 + 50 * HEIGHT]
GONE = object()


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    """A picture with a dog in it, and one with a cat."""
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)).save(tmp_path / name)
    annotation = {"bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0, "segmentation": CORNERS}
    return {
        "images": [
            {"id": at, "file_name": name, "width": WIDTH, "height": HEIGHT} for at, name in ((1, "a.png"), (2, "b.png"))
        ],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [{"id": at, "image_id": at, "category_id": at, **copy.deepcopy(annotation)} for at in (1, 2)],
    }


def asked(document: dict[str, Any], folder: Path, told: list[str] | None = None) -> list[Case]:
    (folder / "a.json").write_text(json.dumps(document))
    return coco_cases(folder / "a.json", folder, absent=1, tell=(told if told is not None else []).append)


def changed(document: dict[str, Any], place: tuple[Any, ...], value: Any) -> None:
    *path, last = place
    item: Any = document
    for key in path:
        item = item[key]
    if value is GONE:
        del item[last]
    else:
        item[last] = value


MASK = ("annotations", 0, "segmentation")
SIZE = [HEIGHT, WIDTH]


@pytest.mark.parametrize(
    ("place", "value", "fact"),
    [
        (("categories", 0, "name"), GONE, "categories.0.name: Field required"),
        (("categories", 0, "name"), None, "categories.0.name"),
        (("categories", 0, "name"), " _", "categories.0.name"),
        (("categories", 1, "id"), 1, "categories has the id 1 more than once"),
        (("images", 1, "id"), 1, "images has the id 1 more than once"),
        (("images", 0, "file_name"), GONE, "images.0.file_name: Field required"),
        (("images", 0, "width"), 0, "images.0.width"),
        (("images", 0, "width"), 50, "a.png has 60 × 40 pixels, and its annotations are of 50 × 40"),
        (("images", 0), None, "images.0: Input should be an object"),
        (("annotations", 0), None, "annotations.0"),
        (("annotations", 0, "category_id"), 9, "annotations.0 is of category 9"),
        (("annotations", 0, "image_id"), GONE, "annotations.0.image_id: Field required"),
        (("annotations", 0, "bbox"), [0, 1], "annotations.0.bbox"),
        (MASK, "abc", "annotations.0.segmentation"),
        (MASK, [1, 2, 3], "annotations.0.segmentation.0"),
        (MASK, [[0, 0, 5, 5]], "annotations.0.segmentation.0: List should have at least 6 items"),
        (MASK, [[float("nan")] * 6], "annotations.0.segmentation.0.0"),
        (MASK, [[0, 0, 10, 0, 10, 10, 0]], "picture 1, category 1, has a polygon"),
        (MASK, [[0, 0, 1e9, 0, 1e9, 1e9]], "picture 1, category 1, has a polygon"),  # pycocotools ends the process
        (MASK, {"counts": RUNS}, "annotations.0.segmentation.size: Field required"),
        (MASK, {"size": SIZE, "counts": None}, "annotations.0.segmentation.counts"),
        (MASK, {"size": SIZE, "counts": [0, -1, 2401]}, "annotations.0.segmentation.counts.1"),
        (MASK, {"size": SIZE, "counts": [0, 100]}, "is not of 60 × 40 pixels"),  # pycocotools never ends
        (MASK, {"size": SIZE, "counts": [0, 100_000]}, "is not of 60 × 40 pixels"),
        (MASK, {"size": SIZE[::-1], "counts": RUNS}, "is not of 60 × 40 pixels"),
        (MASK, {"size": SIZE, "counts": "abc"}, "is not of 60 × 40 pixels"),
        (MASK, {"size": SIZE, "counts": "é"}, "is not of 60 × 40 pixels"),
    ],
)
def test_what_is_damaged_is_told_with_its_place(
    place: tuple[Any, ...], value: Any, fact: str, document: dict[str, Any], tmp_path: Path
) -> None:
    changed(document, place, value)
    with pytest.raises(SpecError, match=fact.replace(".", r"\.")):
        asked(document, tmp_path)


def test_an_object_without_mask_and_box_is_told(document: dict[str, Any], tmp_path: Path) -> None:
    del document["annotations"][1]["segmentation"], document["annotations"][1]["bbox"]
    with pytest.raises(SpecError, match=r"annotations\.1 has neither segmentation nor bbox"):
        asked(document, tmp_path)


@pytest.mark.parametrize(
    "mask",
    [
        CORNERS,
        {"size": SIZE, "counts": RUNS},
        {"size": SIZE, "counts": encode(SQUARE[None])[0]["counts"].decode()},
    ],
)
def test_polygons_and_run_lengths_of_both_kinds_are_one_mask(mask: Any, document: dict[str, Any], tmp_path: Path) -> None:
    document["annotations"][0]["segmentation"] = mask
    first = asked(document, tmp_path)[0].asked[0]
    assert first.masks is not None
    np.testing.assert_array_equal(tools().decode(first.masks[0]), SQUARE)
    np.testing.assert_array_equal(first.boxes, [[0, 0, 10, 10]])


def test_ids_are_numbers_or_words_and_the_size_may_be_left_to_the_file(document: dict[str, Any], tmp_path: Path) -> None:
    plain = asked(document, tmp_path)
    for item in document["images"]:
        del item["width"], item["height"]
        item["id"] = str(item["id"])
    for item in document["annotations"]:
        item["category_id"] = float(item["category_id"])
        del item["id"], item["bbox"], item["area"], item["iscrowd"]
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(document).encode())
    assert read_annotations(tmp_path / "a.json").images[0].id == 1
    again = coco_cases(tmp_path / "a.json", tmp_path, absent=1)
    assert [(item.phrase, item.size, item.boxes.tolist()) for case in plain for item in case.asked] == [
        (item.phrase, item.size, item.boxes.tolist()) for case in again for item in case.asked
    ]


def test_categories_of_one_name_are_one_phrase(document: dict[str, Any], tmp_path: Path) -> None:
    document["categories"][1]["name"] = "_dog "
    document["annotations"][1]["image_id"] = 1
    document["annotations"].append({**document["annotations"][1], "image_id": 2})
    for case, objects in zip(asked(document, tmp_path), (2, 1), strict=True):
        assert [(item.phrase, len(item.boxes)) for item in case.asked] == [("dog", objects)]


def right(cases: list[Case]) -> list[Answers]:
    """The square, wherever something is annotated."""
    boxes = np.array([[0, 0, 10, 10]], dtype=np.float32)
    some = Answers(scores=np.array([0.9]), boxes=boxes, masks=encode(SQUARE[None]))
    none = Answers(scores=np.zeros(0), boxes=np.zeros((0, 4)), masks=[])
    return [some if len(item.boxes) else none for case in cases for item in case.asked]


def test_boxes_alone_are_measured_by_boxes(document: dict[str, Any], tmp_path: Path) -> None:
    for item in document["annotations"]:
        item["segmentation"] = []
    document["annotations"].append({"image_id": 2, "category_id": 2, "bbox": [20, 20, 10, 10]})
    cases = asked(document, tmp_path)
    assert all(item.masks is None for case in cases for item in case.asked)
    found = score([item for case in cases for item in case.asked], right(cases), 0.5)
    assert (found.mask_ap50, found.mask_iou, found.false_alarms, found.objects) == (None, None, 0.0, 3)
    # dog: all; cat: one of two, right: 51 of 101 recalls
    assert found.recall == pytest.approx(2 / 3) and found.box_ap50 == pytest.approx((1 + 51 / 101) / 2)


def test_objects_without_masks_among_others_are_not_asked_for(document: dict[str, Any], tmp_path: Path) -> None:
    del document["annotations"][0]["segmentation"]
    told: list[str] = []
    phrases = [[item.phrase for item in case.asked] for case in asked(document, tmp_path, told)]
    assert phrases == [["cat"], ["cat", "dog"]]  # the dog of the first picture is neither there nor absent
    assert len(told) == 1 and told[0].startswith("1 prompts are left out")


def test_a_crowd_alone_has_no_figure(document: dict[str, Any], tmp_path: Path) -> None:
    for item in document["annotations"]:
        item["iscrowd"] = 1
    cases = asked(document, tmp_path)
    found = score([item for case in cases for item in case.asked], right(cases), 0.5)
    assert (found.box_ap50, found.mask_ap50, found.recall, found.objects) == (None, None, None, 0)


def test_a_picture_is_seen_as_it_was_annotated(document: dict[str, Any], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    pixels[:10, :10] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)  # gray, and turned
    stored, plain = asked(document, tmp_path)
    assert np.asarray(stored.opened())[0, :, 0].tolist() == pixels[0].tolist() and plain.opened() == tmp_path / "b.png"
    document["images"][0] |= {"width": HEIGHT, "height": WIDTH}
    shown, _ = asked(document, tmp_path)
    assert shown.opened() == tmp_path / "a.png" and shown.asked[0].size == (WIDTH, HEIGHT)


def test_damaged_and_missing_pictures_are_told_before_anything_is_measured(document: dict[str, Any], tmp_path: Path) -> None:
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:-30])
    with pytest.raises(SpecError, match=r"b\.png cannot be read as a picture"):
        asked(document, tmp_path)
    for name in ("a.png", "b.png"):
        (tmp_path / name).unlink()
    with pytest.raises(SpecError, match=r"a\.png is missing, and 1 more"):
        asked(document, tmp_path)


def test_pictures_without_an_object_are_asked_for_what_is_absent(document: dict[str, Any], tmp_path: Path) -> None:
    document["annotations"] = []
    cases = asked(document, tmp_path)
    assert all(not len(item.boxes) for case in cases for item in case.asked) and len(cases) == 2
    document["categories"] = []
    with pytest.raises(SpecError, match="no picture with categories"):
        asked(document, tmp_path)
