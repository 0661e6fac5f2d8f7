"""The C++ program of docs/running.md, as it stands: words and a click by three files, with the numbers that Python gives."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from torch import nn

from sam3x.pipeline import export_pipeline, module_image_source
from sam3x.pipeline.export import ComponentJob
from sam3x.runtime import Segmenter
from sam3x.runtime.manifest import SEGMENTER
from support.image_model import taken_from

PAGE = Path(__file__).parents[2] / "docs" / "running.md"


def compiled(folder: Path) -> Path:
    """The program, linked with the library of ONNX Runtime's wheel, which has no headers."""
    import onnxruntime

    (code,) = re.findall(r"^```cpp\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (folder / "segment.cpp").write_text(code)
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    command = ["g++", "-std=c++17", "segment.cpp", "-L", ".", "-lonnxruntime", f"-Wl,-rpath,{folder}", "-o", "segment"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "segment"


def has_headers() -> bool:
    """Whether g++ is here and finds the headers of ONNX Runtime."""
    if shutil.which("g++") is None:
        return False
    command = ["g++", "-x", "c++", "-fsyntax-only", "-include", "onnxruntime_cxx_api.h", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.long
def test_the_program_of_the_page_gives_what_python_gives(
    tiny_model: nn.Module, tiny_pipeline: Path, tiny_vocabulary: Path, tmp_path: Path
) -> None:
    if not has_headers():
        pytest.skip("no g++, or no headers of ONNX Runtime: put their folder into CPATH")
    with mock.patch.object(ComponentJob, "export", taken_from(tiny_pipeline)):
        export_pipeline(module_image_source(tiny_model), output=tmp_path / "out", tokenizer=tiny_vocabulary, fuse=True)
    done = subprocess.run([compiled(tmp_path), tmp_path / "out"], capture_output=True, text=True, check=True)
    words, click = done.stdout.splitlines()

    segmenter = Segmenter(tmp_path / "out")
    run, size, middle = segmenter._components.run, segmenter.manifest.image_size, segmenter.manifest.image_size / 2
    tensors = run("vision_encoder", {"image": np.zeros((1, 3, size, size), np.float32)})
    tensors |= run("text_encoder", {"input_ids": np.array([[1, 5, 2]])})
    no_box = {"boxes": np.full((1, 1, 4), 0.5, np.float32), "box_labels": np.array([[1]]), "box_mask": np.array([[True]])}
    found = run(SEGMENTER, {**tensors, **no_box, "threshold": np.zeros(1, np.float32)})
    best = found["found_scores"].argmax()
    told = [float(number) for number in re.findall(r"[\d.]+", words)]
    wanted = [len(found["found_scores"]), found["found_scores"][best], *found["found_boxes"][best]]
    assert told == pytest.approx([*wanted, (found["found_masks"][best] > 0).sum()], abs=1e-5)

    clicked = {"point_coords": np.array([[[middle, middle], [0, 0]]], np.float32), "point_labels": np.array([[1, -1]])}
    no_mask = {"mask_input": np.zeros((1, 1, *segmenter._mask_size), np.float32), "has_mask_input": np.array([False])}
    answer = run("interactive_head", {**tensors, **clicked, **no_mask})
    scores, masks = answer["iou_predictions"][0, 1:], answer["low_res_masks"][0, 1:]
    told = [float(number) for number in re.findall(r"[\d.]+", click)]
    assert told == pytest.approx([scores.max(), (masks[scores.argmax()] > 0).sum()], abs=1e-5)
