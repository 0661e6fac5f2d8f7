"""Many pictures: processes that share them, runs that go on where an earlier one ended, processes that are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from sam3x.errors import ArtifactError
from sam3x.runtime import Segmenter
from sam3x.runtime.lines import AnswerLines
from sam3x.runtime.many import Drawings, Picture, Question, answers
from support.command_line import run
from support.folders import contents

ASKED = ("--text", "dog", "--threshold", "0", "--max-detections", "2")
FILES = ("--json", "found.jsonl", "--masks", "masks", "--coco", "coco.json", "-o", "drawn")
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with five pictures in ``photos``."""
    (tmp_path / "photos").mkdir()
    draw = np.random.default_rng(1)
    for index in range(5):
        Image.fromarray(draw.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def results(folder: Path) -> dict[str, bytes | str]:
    return {name: data for name, data in contents(folder).items() if not name.startswith("photos")}


def pictures(line_file: Path) -> list[str]:
    return [json.loads(line)["picture"] for line in line_file.read_text().splitlines()]


def test_processes_write_what_one_writes(tiny_pipeline: Path, photos: Path) -> None:
    (photos / "photos" / "2.png").write_bytes(b"no picture")
    alone = run("run", tiny_pipeline, "photos", *ASKED, *FILES, "--no-resume")
    one = results(photos)
    shared = run("run", tiny_pipeline, "photos", *ASKED, *FILES, "--no-resume", "--processes", "2", "--threads", "1")
    for done in (alone, shared):
        assert done.exit_code == 2 and "2.png cannot be read" in done.stderr
        assert "1 of 5 pictures have no answer: 2.png" in " ".join(done.stderr.split())
        assert re.findall(r"found in (\S+)", done.stdout) == ["0.png", "1.png", "3.png", "4.png"]
    assert pictures(photos / "found.jsonl") == ["0.png", "1.png", "3.png", "4.png"]
    several = results(photos)
    assert several.keys() == one.keys()
    assert {name: data for name, data in several.items() if name.startswith("masks")} == {
        name: data for name, data in one.items() if name.startswith("masks")
    }


def test_the_same_command_answers_what_is_new_or_changed_alone(tiny_pipeline: Path, photos: Path) -> None:
    command = ("run", tiny_pipeline, "photos", *ASKED, *FILES)
    run(*command)
    whole = results(photos)
    again = run(*command)
    assert "found in" not in again.stdout and "answered by an earlier run: 5 of 5" in again.stdout
    assert results(photos) == whole

    (photos / "masks" / "1_0.png").unlink()
    Image.new("RGB", (30, 20)).save(photos / "photos" / "3.png")
    Image.new("RGB", (30, 20)).save(photos / "photos" / "0-first.png")
    changed = run(*command)
    assert re.findall(r"found in (\S+)", changed.stdout) == ["0-first.png", "1.png", "3.png"]
    assert pictures(photos / "found.jsonl") == ["0-first.png", *(f"{index}.png" for index in range(5))]
    assert [item["file_name"] for item in json.loads((photos / "coco.json").read_text())["images"]] == pictures(
        photos / "found.jsonl"
    )
    assert "earlier" not in run("run", tiny_pipeline, "photos", "--text", "cat", *ASKED[2:], *FILES).stdout
    assert "earlier" not in run(*command, "--no-resume").stdout


def test_what_a_run_that_was_ended_left_is_taken_and_half_a_line_is_not(tiny_pipeline: Path, photos: Path) -> None:
    command = ("run", tiny_pipeline, "photos", *ASKED, *FILES[:4])
    run(*command)
    lines = (photos / "found.jsonl").read_bytes()
    first, second, _ = lines.split(b"\n", 2)
    (photos / "found.jsonl").unlink()
    (photos / "found.jsonl.part").write_bytes(first + b"\n" + second[: len(second) // 2])
    resumed = run(*command)
    assert resumed.exit_code == 0 and "answered by an earlier run: 1 of 5" in resumed.stdout
    assert (photos / "found.jsonl").read_bytes() == lines and not (photos / "found.jsonl.part").exists()


def test_one_run_writes_a_file_at_a_time_and_an_error_leaves_it(photos: Path) -> None:
    path = photos / "found.jsonl"
    path.write_text("mine\n")
    with pytest.raises(RuntimeError), AnswerLines(path, {"a": "1"}):
        with pytest.raises(ArtifactError, match="another run is writing"):
            AnswerLines(path, {"a": "1"})
        raise RuntimeError
    assert path.read_text() == "mine\n" and not (photos / "found.jsonl.part").exists()


def test_a_process_that_dies_is_one_sentence(tiny_pipeline: Path, photos: Path) -> None:
    given = [Picture(name=f"{index}", stem=f"{index}", source=photos / "photos" / "0.png") for index in range(100)]
    question = Question(how="segment", arguments={"text": "dog"})
    with Segmenter(tiny_pipeline, threads=1) as segmenter:
        found = answers(segmenter, question, given, Drawings(several=True), processes=2)
        next(found)
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(ArtifactError, match=r"a process that was given \d+ died.*fewer --processes"):
            list(found)
    assert not multiprocessing.active_children()


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_run_leaves_whole_files_and_no_process(tiny_pipeline: Path, photos: Path) -> None:
    for index in range(5, 60):
        (photos / "photos" / f"{index}.png").write_bytes((photos / "photos" / f"{index % 5}.png").read_bytes())
    command = [sys.executable, "-m", "sam3x", "run", tiny_pipeline, "photos", *ASKED, *FILES, "--processes", "2", "-q"]
    running = subprocess.Popen([str(item) for item in command])
    part = photos / "found.jsonl.part"
    while not (part.exists() and part.stat().st_size):
        assert running.poll() is None
        time.sleep(0.02)
    children = psutil.Process(running.pid).children(recursive=True)
    running.kill()
    running.wait()
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert not (photos / "found.jsonl").exists() and not (photos / "coco.json").exists()
    for path in [*(photos / "drawn").glob("[!.]*"), *(photos / "masks").glob("[!.]*")]:
        Image.open(path).load()
    resumed = run("run", tiny_pipeline, "photos", *ASKED, *FILES)
    assert resumed.exit_code == 0 and 0 < int(re.findall(r"earlier run: (\d+) of 60", resumed.stdout)[0]) < 60
    ended = results(photos)
    assert run("run", tiny_pipeline, "photos", *ASKED, *FILES, "--no-resume").exit_code == 0
    fresh = results(photos)
    assert ended.keys() == fresh.keys() and len(pictures(photos / "found.jsonl")) == 60
    assert not [name for name in fresh if Path(name).name.startswith(".")]


@pytest.mark.long
def test_the_lines_on_ray_data_run_with_two_workers(tiny_pipeline: Path, photos: Path) -> None:
    """In a process of their own, as Ray starts a cluster on this machine and sets environment variables."""
    page = (DOCS / "running.md").read_text()
    block = next(item for item in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "ray.data" in item)
    code = block.replace('"out/"', repr(str(tiny_pipeline))).replace("threshold=0.5", "threshold=0")
    here = {name: repr(str(photos / name)) for name in ("photos", "answers")}
    for name, path in here.items():
        code = code.replace(f'"{name}/"', path)
    start = "import ray; ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)\n"
    env = {**os.environ, "RAY_TMPDIR": "/tmp", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, env=env, cwd=photos)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for path in (photos / "answers").glob("*.json*") for line in path.read_text().splitlines()]
    assert len(rows) == 5
    segmenter = Segmenter(tiny_pipeline)
    for row in rows:
        wanted = segmenter.segment(row["picture"], ["dog"], threshold=0).to_dict()
        found = json.loads(row["answer"])
        assert [item["score"] for item in found["detections"]] == pytest.approx(
            [item["score"] for item in wanted["detections"]], abs=1e-5
        )
