"""``segmenter.mjs`` in Node: pictures and masks to the bit, tokens, and the answers of every kind of pipeline."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sam3x.runtime.output import run_lengths
from sam3x.runtime.regions import mended
from sam3x.runtime.resize import resize_bilinear, resize_picture
from sam3x.web.site import opened_site, write_site
from support.browser import assert_same
from support.image_model import photograph

if TYPE_CHECKING:
    from support.folders import MadeOnce

ROOT = Path(__file__).parents[2]
MODULE = ROOT / "exporter" / "web" / "page" / "segmenter.mjs"


def node(code: str, folder: Path, *arguments: str) -> str:
    """What a module prints that runs in ``folder``."""
    if shutil.which("node") is None:
        pytest.skip("no Node.js here: apt-get install nodejs")
    (folder / "test.mjs").write_text(code)
    done = subprocess.run(["node", "test.mjs", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("width", "height", "size"), [(640, 427, 112), (640, 427, 1008), (33, 640, 112), (112, 112, 112), (1, 1, 7)]
)
def test_pictures_are_resized_as_in_python(width: int, height: int, size: int, tmp_path: Path) -> None:
    picture = photograph().resize((width, height)).convert("RGBA")
    (tmp_path / "picture").write_bytes(picture.tobytes())
    node(
        f"""import {{ readFileSync, writeFileSync }} from "node:fs"; import {{ resized }} from "{MODULE}";
        writeFileSync("found", resized(readFileSync("picture"), {width}, {height}, {size}));""",
        tmp_path,
    )
    found = np.fromfile(tmp_path / "found", np.uint8).reshape(size, size, 3)
    np.testing.assert_array_equal(found, resize_picture(np.asarray(picture.convert("RGB")), size, size))


@pytest.mark.parametrize(("width", "height"), [(640, 427), (31, 20), (32, 24), (1, 1)])
def test_masks_are_stretched_and_told_as_in_python(width: int, height: int, tmp_path: Path) -> None:
    logits = np.random.default_rng(0).standard_normal((24, 32), dtype=np.float32)
    logits.tofile(tmp_path / "logits")
    out = node(
        f"""import {{ readFileSync }} from "node:fs"; import {{ runLengths, stretched }} from "{MODULE}";
        const data = new Float32Array(new Uint8Array(readFileSync("logits")).buffer);
        const mask = stretched({{ data, width: 32, height: 24, border: 0.1 }}, {width}, {height});
        console.log(JSON.stringify(runLengths(mask, {width}, {height})));""",
        tmp_path,
    )
    expected = resize_bilinear(logits[None], height, width)[0] > np.float32(0.1)
    assert json.loads(out) == run_lengths(expected).tolist()


def test_holes_and_specks_are_mended_as_in_python(tmp_path: Path) -> None:
    logits = np.random.default_rng(1).standard_normal((3, 40, 36), dtype=np.float32).cumsum(axis=2) + 1
    logits.tofile(tmp_path / "logits")
    node(
        f"""import {{ readFileSync, writeFileSync }} from "node:fs"; import {{ mended }} from "{MODULE}";
        const data = new Float32Array(new Uint8Array(readFileSync("logits")).buffer);
        const rule = {{ mask_threshold: 0, max_hole_area: 9, max_sprinkle_area: 4 }};
        const each = [0, 1, 2].map((at) => mended(data.slice(at * 1440, at * 1440 + 1440), [40, 36], rule));
        writeFileSync("found", Buffer.concat(each.map(({{ buffer }}) => Buffer.from(buffer))));""",
        tmp_path,
    )
    found = np.fromfile(tmp_path / "found", np.float32).reshape(logits.shape)
    expected = mended(logits, 0, 9, 4)
    assert (expected != logits).any()
    np.testing.assert_array_equal(found, expected)


def test_clicks_that_cannot_be_answered_are_one_sentence(tmp_path: Path) -> None:
    asked = [{}, {"points": [[1, 2]], "labels": [True, False]}, {"points": [[1, 10]]}, {"points": [[1]]}, {"box": [5, 5, 1, 1]}]
    out = node(
        f"""import {{ Segmenter }} from "{MODULE}";
        const segmenter = new Segmenter({{ manifest: {{ clicks: {{}}, image_size: 8, components: [] }} }});
        for (const asked of {json.dumps(asked)})
          await segmenter.click({{ width: 9, height: 9 }}, asked).catch((error) => console.log(error.name, error.message));""",
        tmp_path,
    )
    told = ("Nothing is clicked", "2 labels for 1 points", "lies outside", "lies outside", "x0 < x1")
    lines = out.splitlines()
    assert len(lines) == len(told) and all(fact in line for fact, line in zip(told, lines, strict=True)), lines


@pytest.fixture
def written(node_modules: Path, tmp_path: Path) -> Callable[[Path], Path]:
    """Write the site of a folder where Node finds the packages beside it."""

    def write(folder: Path) -> Path:
        with opened_site(folder, node_modules) as site:
            write_site(site, tmp_path / "site")
        (tmp_path / "node_modules").symlink_to(node_modules)
        return tmp_path

    return write


def program() -> str:
    """The program of the page, as it stands."""
    (found,) = re.findall(r"^```js\n(.*?)^```", (ROOT / "docs" / "running.md").read_text(), re.DOTALL | re.MULTILINE)
    return found


@pytest.mark.long
def test_the_program_of_the_page_gives_what_python_gives(tiny_pipeline: Path, written: Callable[[Path], Path]) -> None:
    from sam3x.runtime import Segmenter

    out = node(program(), written(tiny_pipeline), "dog", "red car")
    *found, clicked = [json.loads(line) for line in out.splitlines()]
    segmenter, grey = Segmenter(tiny_pipeline), np.full((427, 640, 3), 128, np.uint8)
    expected = segmenter.segment(grey, text=["dog", "red car"], threshold=0)
    assert [item["label"] for item in found] == expected.labels
    np.testing.assert_allclose([item["score"] for item in found], expected.scores, atol=1e-5)
    np.testing.assert_allclose([item["box"] for item in found], expected.boxes, atol=1e-2)
    areas = [expected.area(index) for index in range(len(expected))]
    np.testing.assert_allclose([item["pixels"] for item in found], areas, rtol=1e-3, atol=2)
    best = segmenter.click(grey, points=[[320, 213]]).best
    assert clicked["score"] == pytest.approx(best.scores[0], abs=1e-5)
    np.testing.assert_allclose(clicked["box"], best.boxes[0], atol=1)


TEXTS = (
    "dog",
    "  The “dog”'s\tRED  car!! 42",
    "naïve café — ДОМ 犬 🐕",
    "R&amp;amp;D &lt;b&gt; &#39;x&#x27;",
    "don't we'll",
    "red circle of no word",
    "a " * 90,
)


@pytest.mark.long
@pytest.mark.parametrize("whose", ("tiny_pipeline", "demo"))
def test_tokens_are_those_of_python(whose: str, request: pytest.FixtureRequest, node_modules: Path, tmp_path: Path) -> None:
    """Byte pairs, and whole words of which some are unknown."""
    from sam3x.demo import WEIGHTS
    from sam3x.runtime.text import Tokenizer

    path = (WEIGHTS if whose == "demo" else request.getfixturevalue(whose)) / "tokenizer.json"
    (tmp_path / "node_modules").symlink_to(node_modules)
    code = f"""import {{ Tokenizer }} from "@huggingface/tokenizers"; import {{ readFileSync }} from "node:fs";
        import {{ Segmenter }} from "{MODULE}";
        const tokenizer = new Tokenizer(JSON.parse(readFileSync("{path}")), {{}});
        const manifest = {{ context_length: 32, unescape_html: true, components: [] }};
        const segmenter = new Segmenter({{ manifest, tokenizer }});
        console.log(JSON.stringify(process.argv.slice(2).map((text) => segmenter.ids(text))));"""
    python = Tokenizer(path, 32, unescape_html=True)
    assert json.loads(node(code, tmp_path, *TEXTS)) == [python(text) for text in TEXTS]


@pytest.fixture
def transformers_pipeline(made_once: MadeOnce) -> Path:
    from sam3x.pipeline import export_pipeline, module_image_source
    from support.transformers_model import tiny

    return made_once("web_transformers", lambda folder: export_pipeline(module_image_source(tiny("Sam3Model")), output=folder))


@pytest.mark.long
@pytest.mark.parametrize("kind", ("fused", "transformers"))
def test_other_pipelines_give_what_python_gives(
    kind: str, request: pytest.FixtureRequest, node_modules: Path, tmp_path: Path
) -> None:
    """With dac in the file it takes two prompts at least; transformers' masks are stretched as probabilities."""
    from sam3x.runtime import Segmenter

    folder: Path = request.getfixturevalue(f"{kind}_pipeline")
    asked: list[dict[str, Any]] = [
        {"ids": [3, 5, 7]},
        {"ids": [9, 2], "boxes": [[10, 20, 200, 180], [30, 40, 90, 90]], "labels": [True, False]},
        {"ids": [4, 8, 2]},
    ]
    shutil.copytree(folder, tmp_path / "site")
    shutil.copy(MODULE, tmp_path / "site")
    (tmp_path / "node_modules").symlink_to(node_modules)
    (tmp_path / "picture").write_bytes(photograph().convert("RGBA").tobytes())
    code = (
        program().partition("const tokenizer")[0]
        + f"""const segmenter = new Segmenter({{ manifest, ort, open }});
        const image = await segmenter.encode({{ data: await readFile("picture"), width: 640, height: 427 }});
        const found = await segmenter.segment(image, {json.dumps(asked)}, 0);
        const {{ runLengths }} = await import("./site/segmenter.mjs");
        const told = found.map(({{ mask, ...item }}) => {{
          const counts = runLengths(stretched(mask, 640, 427), 640, 427);
          return {{ ...item, mask: {{ size: [427, 640], counts }} }};
        }});
        console.log(JSON.stringify({{ detections: told }}));"""
    )
    expected = Segmenter(folder).segment(
        photograph(),
        [item["ids"] for item in asked],
        [item.get("boxes", []) for item in asked],
        [item.get("labels", []) for item in asked],
        threshold=0,
    )
    assert_same(json.loads(node(code, tmp_path)), expected.to_dict())
