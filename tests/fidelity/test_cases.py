"""A user's own pictures and COCO annotations: what is asked of them, what is right, what is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sam3x.artifact.manifest import read_manifest
from sam3x.demo.scenes import draw, scene
from sam3x.errors import SpecError, Step, VerificationError
from sam3x.fidelity.cases import coco_cases
from sam3x.pipeline import export
from support.command_line import run
from support.folders import altered


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Path, list[Any]]:
    """Three pictures, annotated by kind: polygons, run lengths, one crowd; the scenes as they were drawn."""
    document: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
    names = ["circle", "square", "triangle", "star", "cross", "fire_hydrant"]
    document["categories"] = [{"id": 10 * index, "name": name} for index, name in enumerate(names)]
    kept = []
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        made = scene(np.random.default_rng(number + 5))
        drawn = draw(made, 96)
        kept.append((made, drawn))
        Image.fromarray(drawn.pixels).save(tmp_path / "pictures" / f"{number}.png")
        document["images"].append({"id": number, "file_name": f"{number}.png", "width": 96, "height": 96})
        for shape, mask, box in zip(made.shapes, drawn.masks, drawn.boxes.tolist(), strict=True):
            runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[1 - mask.T.ravel()[0]], mask.T.ravel(), [2]]).astype(int))))
            counts = ([0] if mask.T.ravel()[0] else []) + runs.tolist()
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 10 * names.index(shape.kind),
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [96, 96], "counts": counts},
                }
            )
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    return tmp_path, kept


def test_a_picture_is_asked_its_own_categories_and_some_others(dataset: tuple[Path, list[Any]]) -> None:
    folder, kept = dataset
    found = coco_cases(folder / "annotations.json", folder / "pictures", absent=1)
    assert [case.picture.name for case in found] == ["0.png", "1.png", "2.png"]
    for case, (made, drawn) in zip(found, kept, strict=True):
        kinds = {shape.kind for shape in made.shapes}
        present = [item for item in case.asked if len(item.boxes)]
        assert {item.phrase for item in present} == kinds and len(case.asked) == len(kinds) + 1
        for item in present:
            own = [index for index, shape in enumerate(made.shapes) if shape.kind == item.phrase]
            np.testing.assert_allclose(item.boxes, drawn.boxes[own])
    every = coco_cases(folder / "annotations.json", folder / "pictures", absent=99)
    assert all("fire hydrant" in {item.phrase for item in case.asked} for case in every)
    assert len(coco_cases(folder / "annotations.json", folder / "pictures", limit=2)) == 2


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("{", "cannot be read as COCO"),
        ("[]", "Input should be an object"),
        ('{"images": 3}', r"cannot be read as COCO annotations \(images"),
        (None, "No such file"),
    ],
)
def test_annotations_that_are_none_are_told(text: str | None, fact: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(SpecError, match=fact):
        coco_cases(tmp_path / "a.json", tmp_path)


def test_what_is_missing_is_told(dataset: tuple[Path, list[Any]]) -> None:
    folder, _ = dataset
    with pytest.raises(SpecError, match=r"0\.png is missing.*--pictures"):
        coco_cases(folder / "annotations.json", folder)
    (folder / "none.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(SpecError, match="no picture with categories"):
        coco_cases(folder / "none.json", folder)


def test_the_command_measures_folders_on_annotations(dataset: tuple[Path, list[Any]], demo_pipeline: Path) -> None:
    folder, kept = dataset
    given = ("--annotations", folder / "annotations.json", "--pictures", folder / "pictures", "--absent", "2")
    done = run("fidelity", demo_pipeline, demo_pipeline, *given, "--markdown", folder / "page.md", "--json")
    assert done.exit_code == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert first["against"] is None and second["against"]["worst_iou"] == 1.0 and second["against"]["lost"] == 0
    assert first["figures"] == second["figures"] and first["figures"]["pictures"] == 3
    assert first["figures"]["objects"] == sum(len(made.shapes) for made, _ in kept)
    assert "annotations.json: 3" in (folder / "page.md").read_text()


def test_options_that_do_not_fit_are_told_before_anything_is_measured(
    demo_pipeline: Path, default_artifact: Path, tmp_path: Path
) -> None:
    for arguments, fact in (
        ((demo_pipeline, "--pictures", tmp_path), "--pictures belongs to --annotations"),
        ((demo_pipeline, "--absent", "1"), "--absent belongs to --annotations"),
        ((demo_pipeline, "--target", "onnx"), "--target belongs to the model that sam3x brings"),
        ((demo_pipeline, "-o", tmp_path / "kept"), "--output belongs to the model that sam3x brings"),
        (("--target", "tpu"), "no target tpu here"),
        ((demo_pipeline, "--markdown", tmp_path / "none" / "page.md"), "page.md cannot be written"),
        ((demo_pipeline, "--markdown", tmp_path), "cannot be written"),
        ((demo_pipeline, tmp_path / "none"), "manifest.json cannot be read"),
        ((demo_pipeline, default_artifact), "holds no pipeline, but a single encoder"),
    ):
        done = run("fidelity", *arguments, "--limit", "1")
        assert done.exit_code == 2 and fact in done.stderr and "demo_pipeline (onnx" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_without_words_is_refused_before_anything_is_measured(demo_pipeline: Path, tmp_path: Path) -> None:
    for number, fields in enumerate(({"tokenizer": None}, {"components": read_manifest(demo_pipeline).components[:4]})):
        folder = altered(demo_pipeline, tmp_path / str(number), **fields)
        done = run("fidelity", demo_pipeline, folder, "--limit", "1")
        assert done.exit_code == 2 and "1 pictures" not in done.stderr, done.stderr


def test_pipelines_of_one_name_and_of_other_weights_are_told_apart(demo_pipeline: Path, tmp_path: Path) -> None:
    other = altered(demo_pipeline, tmp_path / demo_pipeline.name, weights_sha256="0" * 64)
    done = run("fidelity", demo_pipeline, other, "--limit", "1", "--threads", "1", "--markdown", tmp_path / "page.md")
    assert done.exit_code == 0, done.stderr
    assert f"{other} (onnx fp32) was exported from other weights" in done.stderr.replace("\n", " ")
    page = (tmp_path / "page.md").read_text()
    assert f"Exported from other weights than the first: {other} (onnx fp32)." in page and f"| {demo_pipeline} (onnx" in page


def test_what_an_earlier_run_exported_of_the_same_weights_is_taken(demo_pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_pipeline, tmp_path / "onnx")
    done = run("fidelity", "--target", "trt", "--limit", "1", "-o", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    names = [item["name"] for item in json.loads(done.stdout)]
    assert names == ["onnx fp32", "trt tf32, emulated", "trt fp16, emulated", "trt bf16, emulated"]
    assert "capture" not in done.stderr and [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_a_precision_that_fails_its_verification_is_left_out_and_told(
    demo_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise VerificationError("it is too far off", step=Step.VERIFY)

    monkeypatch.setattr(export, "export_pipeline", failing)
    shutil.copytree(demo_pipeline, tmp_path / "onnx")
    done = run("fidelity", "--target", "onnx", "--limit", "1", "-o", tmp_path, "--markdown", tmp_path / "page.md")
    assert done.exit_code == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    assert (
        "| onnx fp32 |" in page and page.count("Left out: ") == 4 and "onnx fp16: step 4/4 verify: it is too far off." in page
    )
