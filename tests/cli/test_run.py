"""``sam3x run``: several pictures, a folder, standard input; masks, COCO, JSON, ids, thresholds, boxes of both kinds."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from typer.testing import CliRunner

from sam3x.cli.app import app
from sam3x.runtime import Segmenter
from support.command_line import run

BOX = [10.0, 10.0, 40.0, 50.0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: two pictures of one name in ``photos``, one in ``more``, and a text."""
    draw = np.random.default_rng(1)
    for name in ("photos/a.png", "photos/a.jpg", "more/a.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_gives_json_lines_masks_drawings_and_coco(tiny_pipeline: Path, folder: Path) -> None:
    written = ("--json", "found.jsonl", "--masks", "masks", "--coco", "coco.json", "-o", "drawn")
    done = run("run", tiny_pipeline, "photos", "--text", "dog", "--threshold", "0", "--max-detections", "2", *written)
    assert done.exit_code == 0 and "2 found in a.jpg" in done.stdout and "2 found in a.png" in done.stdout
    lines = [json.loads(line) for line in (folder / "found.jsonl").read_text().splitlines()]
    assert [line["picture"] for line in lines] == ["a.jpg", "a.png"]
    assert {path.name for path in (folder / "drawn").iterdir()} == {"a.png", "a-2.png"}
    assert {path.name for path in (folder / "masks").iterdir()} == {"a_0.png", "a_1.png", "a-2_0.png", "a-2_1.png"}
    read = COCO(str(folder / "coco.json"))
    segmenter = Segmenter(tiny_pipeline)
    for number, (line, stem) in enumerate(zip(lines, ("a", "a-2"), strict=True), start=1):
        wanted = segmenter.segment(folder / "photos" / line["picture"], "dog", threshold=0, max_detections=2)
        assert [item["score"] for item in line["detections"]] == pytest.approx(wanted.scores.tolist(), abs=1e-5)
        for index, annotation in enumerate(read.loadAnns(read.getAnnIds(imgIds=[number]))):
            np.testing.assert_array_equal(read.annToMask(annotation).astype(bool), wanted.masks[index])
            png = np.asarray(Image.open(folder / "masks" / f"{stem}_{index}.png"))
            np.testing.assert_array_equal(png == 255, wanted.masks[index])


def test_standard_input_and_json_to_standard_output(tiny_pipeline: Path, folder: Path) -> None:
    file = io.BytesIO()
    Image.open("photos/a.png").save(file, "PNG")
    command = ["run", str(tiny_pipeline), "-", "--ids", "1,7,9", "--threshold", "0", "--json", "-"]
    done = CliRunner().invoke(app, command, input=file.getvalue())
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["picture"] == "stdin" and found["prompts"] == ["ids [1, 7, 9]"]
    assert len(found["detections"]) == 12
    done = CliRunner().invoke(app, command, input=b"")
    assert done.exit_code == 2 and "cannot be read as a picture" in done.stderr
    assert "given twice" in run("run", tiny_pipeline, "-", "-", "--text", "dog").stderr


def test_a_minus_sign_is_a_number_and_not_box_is_what_is_not_wanted(tiny_pipeline: Path, folder: Path) -> None:
    boxes = ("--box", "-10,10,40,50", "--not-box", "-5,0,30,20", "--not-box=2,2,9,9")
    done = run("run", tiny_pipeline, "photos/a.png", *boxes, "--threshold", "0", "--json", "-", "-q")
    given = [[-10, 10, 40, 50], [-5, 0, 30, 20], [2, 2, 9, 9]]
    wanted = Segmenter(tiny_pipeline).segment("photos/a.png", boxes=given, labels=[True, False, False], threshold=0)
    assert [item["score"] for item in json.loads(done.stdout)["detections"]] == pytest.approx(wanted.scores.tolist(), abs=1e-5)


def test_a_threshold_for_each_prompt_texts_first(tiny_pipeline: Path, folder: Path) -> None:
    prompts = ("--ids", "1,7,9", "--text", "dog", "--threshold", "1", "--threshold", "0")
    found = json.loads(run("run", tiny_pipeline, "photos/a.png", *prompts, "--json", "-").stdout)
    assert found["prompts"] == ["dog", "ids [1, 7, 9]"] and {item["prompt"] for item in found["detections"]} == {1}


def test_run_without_a_threshold_takes_the_manifests(tiny_pipeline: Path, folder: Path) -> None:
    from sam3x.runtime.manifest import load_manifest

    found = json.loads(run("run", tiny_pipeline, "photos/a.png", "--text", "dog", "--json", "-").stdout)
    wanted = Segmenter(tiny_pipeline).segment("photos/a.png", "dog", threshold=load_manifest(tiny_pipeline).threshold)
    assert len(found["detections"]) == len(wanted)


def test_a_picture_that_cannot_be_read_stops_nothing_but_is_told(tiny_pipeline: Path, folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"no picture")
    done = run("run", tiny_pipeline, "bad.png", "more/a.png", "--text", "dog", "--threshold", "0", "--json", "found.jsonl")
    assert done.exit_code == 2 and "bad.png cannot be read" in done.stderr and "12 found in more/a.png" in done.stdout
    assert [json.loads(line)["picture"] for line in (folder / "found.jsonl").read_text().splitlines()] == ["more/a.png"]


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["photos"], "Give --text, --ids, --box, --point or --everything"),
        (["photos", "--ids", "1,x"], "--ids: expected token ids"),
        (["photos", "--not-box", "1,2,3"], "--not-box: expected X0,Y0,X1,Y1"),
        (["photos", "--text", "a", "--threshold", "nan"], "a threshold is a number from 0 to 1"),
        (["photos", "--text", "a", "--threshold", "0", "--threshold", "0"], "2 thresholds for 1 prompts"),
        (["photos", "--text", "a", "--json", "none/found.json"], "none/found.json cannot be written"),
        (["photos", "--text", "a", "--coco", "photos"], "photos cannot be written"),
        (["photos", "--text", "a", "-o", "photos/notes.txt"], "notes.txt cannot be written"),
        (["photos/a.png", "--text", "a", "-o", "photos"], "photos cannot be written"),
        (["photos/a.png", "--text", "a", "--max-pixels", "9"], "holds 4,800 pixels, and max_pixels allows 9"),
        (["photos/a.png", "--text", "a", "--provider", "cdua"], "Did you mean 'cuda'?"),
        (["empty", "--text", "a"], "empty holds no picture"),
        (["nowhere.png", "--text", "a"], "nowhere.png cannot be read as a picture (No such file or directory)"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(arguments: list[str], fact: str, tiny_pipeline: Path, folder: Path) -> None:
    (folder / "empty").mkdir()
    done = run("run", tiny_pipeline, *arguments)
    assert done.exit_code == 2 and fact in " ".join(done.stderr.split()) and done.stderr.count("sam3x: ") == 1


def found(*options: str) -> list[Any]:
    done = CliRunner().invoke(app, ["run", *options, "--json", "-"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["detections"]


def test_points_and_boxes_without_words_are_clicks(tiny_pipeline: Path, folder: Path) -> None:
    here, segmenter = (str(tiny_pipeline), "photos/a.png"), Segmenter(tiny_pipeline)
    image = segmenter.encode(folder / "photos" / "a.png")
    for options, wanted in (
        (["--point", "20,30"], segmenter.click(image, [[20, 30]]).best),
        (["--point", "20,30", "--max-detections", "3"], segmenter.click(image, [[20, 30]]).top(3)),
        (
            ["--point", "20,30", "--not-point", "70,5", "--box", "10,10,40,50"],
            segmenter.click(image, [[20, 30], [70, 5]], [1, 0], box=BOX, multimask=False),
        ),
        (["--box", "10,10,40,50", "--box=-5,0,30,20"], segmenter.click(image, box=[BOX, [-5, 0, 30, 20]], multimask=False)),
    ):
        masks = found(*here, *options)
        assert [item["score"] for item in masks] == pytest.approx(wanted.scores.tolist(), abs=1e-5)
        for item, runs in zip(masks, map(wanted.run_lengths, range(len(wanted))), strict=True):
            assert item["mask"]["counts"] == runs.tolist()
    like = found(*here, "--text", "visual", "--box", "10,10,40,50", "--threshold", "0")
    assert len(like) == len(segmenter.segment(image, boxes=[BOX], threshold=0))


def test_everything_takes_its_rules_from_the_command_line(tiny_pipeline: Path, folder: Path) -> None:
    """Masks of random weights reach over the whole picture, and the best one suppresses the others."""
    here = (str(tiny_pipeline), "photos/a.png", "--everything", "--points-per-side", "3", "--max-detections", "4")
    segmenter, picture = Segmenter(tiny_pipeline), folder / "photos" / "a.png"
    for threshold, stable, count in (("0.1", "0.2", 1), ("0.99", "0.2", 0), ("0.1", "1", 0)):
        masks = found(*here, "--threshold", threshold, "--stability-score-thresh", stable)
        rules = {"pred_iou_thresh": float(threshold), "stability_score_thresh": float(stable)}
        wanted = segmenter.everything(picture, points_per_side=3, **rules)
        assert [item["label"] for item in masks] == list(wanted.prompts) and len(masks) == count
        assert [item["score"] for item in masks] == pytest.approx(wanted.scores.tolist(), abs=1e-5)


def test_of_several_pictures_the_one_where_a_click_lies_outside_is_named(tiny_pipeline: Path, folder: Path) -> None:
    Image.new("RGB", (90, 80)).save("more/b.png")
    done = run("run", tiny_pipeline, "more", "--point", "85,70")
    assert done.exit_code == 2 and "1 found in b.png" in done.stdout
    assert "a.png: run: the point [85.0, 70.0] lies outside the picture" in " ".join(done.stderr.split())


def test_everything_that_is_nothing_is_told(tiny_pipeline: Path, folder: Path) -> None:
    done = run(
        "run", tiny_pipeline, "photos/a.png", "--everything", "--points-per-side", "1", "--threshold", "1", "-o", "all.png"
    )
    assert done.exit_code == 0 and done.stdout.strip() == "nothing found"
    assert Image.open("all.png").size == (80, 60)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (["--everything", "--text", "dog"], "--text and --ids: it says what to look for"),
        (["--everything", "--point", "1,2"], "--point: it says what to look for"),
        (["--everything", "--threshold", "0.5", "--threshold", "0.6"], "--everything has one threshold"),
        (["--everything", "--stability-score-thresh", "2"], "--stability-score-thresh is a number from 0 to 1"),
        (["--everything", "--threshold", "2"], "--threshold is a number from 0 to 1"),
        (["--text", "dog", "--points-per-side", "3"], "--points-per-side: it belongs to --everything"),
        (["--point", "1,2", "--text", "dog"], "--text and --ids: it belongs to a search"),
        (["--point", "1,2", "--not-box", "1,2,3,4"], "--not-box: it belongs to a search"),
        (["--box", "1,2,3,4", "--threshold", "0.5"], "--threshold: it belongs to a search"),
        (["--point", "1,2", "--box", "1,2,3,4", "--box", "1,2,3,5"], "points and several boxes"),
        (["--point", "1"], "--point: expected X,Y"),
        (["--point", "1,900"], "lies outside the picture"),
    ],
)
def test_clicks_that_do_not_fit_get_one_sentence(tiny_pipeline: Path, folder: Path, options: list[str], fact: str) -> None:
    done = run("run", tiny_pipeline, "photos/a.png", *options)
    assert done.exit_code == 2 and fact in " ".join(done.stderr.split())
