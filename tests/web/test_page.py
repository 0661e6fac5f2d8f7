"""The page in a real browser: what a person does, and the answers of ``Segmenter``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from support.browser import assert_same

if TYPE_CHECKING:
    from sam3x.runtime import Segmenter
    from sam3x.web.site import Site

pytestmark = pytest.mark.long

HEAR = """() => {
  window.heard = [];
  new MutationObserver(() => heard.push(document.getElementById("words").textContent))
    .observe(document.getElementById("words"), { childList: true, characterData: true, subtree: true });
}"""


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.image_model import photograph

    path = tmp_path_factory.mktemp("pictures") / "china.png"
    photograph().save(path)
    return path


@pytest.fixture(scope="module")
def segmenter(tiny_pipeline: Path) -> Iterator[Segmenter]:
    from sam3x.runtime import Segmenter

    with Segmenter(tiny_pipeline) as segmenter:
        yield segmenter


@pytest.fixture(scope="module")
def served(site: Site, serving: Callable[..., Any]) -> Iterator[Any]:
    with serving(site) as served:
        yield served


@pytest.fixture
def page(served: Any, browse: Callable[..., Any]) -> Any:
    """The page with the model loaded; everything that scores is found."""
    return browse(served.url).ready().threshold(0)


def test_words_give_the_masks_of_segmenter_with_one_pass_over_the_picture(
    page: Any, picture: Path, segmenter: Segmenter
) -> None:
    page.page.evaluate(HEAR)
    page.choose(picture).idle()
    assert page.page.inner_text("#words") == "Type words, or draw a box."
    assert_same(page.find("dog, red car"), segmenter.segment(picture, text=["dog", "red car"], threshold=0).to_dict())
    assert_same(page.find("The “Dog”!"), segmenter.segment(picture, text="The “Dog”!", threshold=0).to_dict())
    scores = segmenter.segment(picture, text="dog", threshold=0).scores
    steps = [value for value in np.arange(1, 100) / 100 if min(scores) < value < max(scores)]  # the slider's
    split = max(steps, key=lambda value: min(np.abs(scores - value)))
    page.find("dog")
    page.threshold(split).page.click("#go")
    expected = segmenter.segment(picture, text="dog", threshold=split).to_dict()
    assert len(expected["detections"]) < len(scores)
    assert_same(page.answer(), expected)
    page.threshold(1).page.click("#go")
    page.idle()
    assert page.page.inner_text("#count").startswith("Nothing found") and not page.page.is_visible("#save")
    heard = page.page.evaluate("heard")
    assert len({words for words in heard if "Encoding" in words}) == 1 and heard.count("Encoding the picture …") == 1


def test_boxes_drawn_with_the_mouse_are_examples(page: Any, picture: Path, segmenter: Segmenter) -> None:
    page.choose(picture).idle()
    page.drag(0.2, 0.3, 0.55, 0.8)
    (box,) = page.marks()
    assert box == pytest.approx([0.2 * 640, 0.3 * 427, 0.55 * 640, 0.8 * 427], abs=2)
    assert_same(page.answer(), segmenter.segment(picture, boxes=[box], threshold=0).to_dict())
    page.page.check("[value=not-box]")
    page.drag(0.9, 0.5, 0.7, 0.1)  # from the lower right corner
    like, other = page.marks()
    given = {"boxes": [like, other], "labels": [True, False], "threshold": 0}
    assert_same(page.answer(), segmenter.segment(picture, **given).to_dict())
    assert_same(page.find("dog"), segmenter.segment(picture, text="dog", **given).to_dict())
    page.page.click("#marks button >> nth=0")
    page.idle()
    assert_same(page.answer(), segmenter.segment(picture, text="dog", boxes=[other], labels=[False], threshold=0).to_dict())
    page.page.click("#clear")
    assert page.marks() == [] and not page.page.is_visible("#count") and page.page.is_disabled("#go")


def test_clicks_cut_out_one_object(page: Any, picture: Path, segmenter: Segmenter) -> None:
    def best(**given: Any) -> dict[str, Any]:
        return segmenter.click(picture, **given).best.to_dict()

    page.choose(picture).idle()
    page.page.check("[value=click]")
    assert not page.page.is_visible("#text")
    page.drag(0.4, 0.5, 0.4, 0.5)
    (first,) = page.marks()
    assert_same(page.answer(), best(points=[first]))
    page.page.keyboard.down("Shift")
    page.drag(0.8, 0.2, 0.8, 0.2)
    page.page.keyboard.up("Shift")
    first, second = page.marks()
    assert_same(page.answer(), best(points=[first, second], labels=[1, 0], multimask=False))
    page.page.check("[value=object-box]")
    page.drag(0.1, 0.1, 0.5, 0.5)
    page.drag(0.2, 0.3, 0.6, 0.9)  # in place of the one before
    *_, box = page.marks()
    assert len(page.marks()) == 3
    assert_same(page.answer(), best(points=[first, second], labels=[1, 0], box=box, multimask=False))


def test_a_keyboard_is_enough(page: Any, picture: Path, segmenter: Segmenter) -> None:
    page.choose(picture).idle()
    page.page.focus("#file")
    press = page.page.keyboard.press
    press("Tab")  # what to do
    press("Tab")
    page.page.keyboard.type("dog")
    press("Tab")  # the tools
    press("ArrowDown")  # not like this
    press("Tab")
    press("Enter")  # without a mouse
    press("Tab")
    page.page.keyboard.type("10, 20, 200, 180")
    press("Enter")
    expected = segmenter.segment(picture, text="dog", boxes=[[10, 20, 200, 180]], labels=[False], threshold=0).to_dict()
    assert_same(page.answer(), expected)
    page.page.fill("#numbers", "10, 20, 900, 180")
    page.page.press("#numbers", "Enter")
    assert page.error == "10, 20, 900, 180 lies outside the picture, which is 640 × 427 pixels."
    page.page.fill("#numbers", "10, 20")
    page.page.press("#numbers", "Enter")
    assert page.error == "Give four numbers: x0, y0, x1, y1."


def test_a_second_picture_turned_by_its_exif_takes_the_place_of_the_first(
    page: Any, picture: Path, segmenter: Segmenter, tmp_path: Path
) -> None:
    from PIL import Image

    with Image.open(picture) as first:
        second = first.resize((231, 154))
    exif = Image.Exif()
    exif[0x0112] = 6
    second.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    page.choose(picture)
    page.find("dog")
    page.choose(tmp_path / "turned.jpg")
    found = page.answer()  # the words are asked again
    assert (found["picture"], found["width"], found["height"]) == ("turned.jpg", 154, 231)
    assert_same(found, segmenter.segment(tmp_path / "turned.jpg", text="dog", threshold=0).to_dict(), iou=0.98)


def test_a_wrong_file_is_told_and_the_next_one_is_read(page: Any, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("no picture")
    page.choose(picture)
    page.find("dog")
    page.choose(tmp_path / "photo.jpg").idle()
    assert page.error == "photo.jpg cannot be read as a picture. Give a JPEG, PNG, WebP, GIF or AVIF file."
    assert not page.page.is_visible("#count") and page.page.is_disabled("#go")
    page.choose(picture)
    assert page.answer()["detections"]


def test_a_lost_file_a_damaged_one_and_another_try(
    site: Site, serving: Callable[..., Any], browse: Callable[..., Any], picture: Path, tmp_path: Path
) -> None:
    with serving(site) as served:
        whole = served.files.pop("decoder.onnx")
        page = browse(served.url)
        page.page.wait_for_selector("#error:visible")
        assert page.error.startswith("decoder.onnx cannot be loaded: the server answers 404.")
        damaged = bytearray(whole.read_bytes())
        damaged[1000] ^= 1
        (tmp_path / "decoder.onnx").write_bytes(damaged)
        served.files["decoder.onnx"] = tmp_path / "decoder.onnx"
        page.page.click("#load")
        page.page.wait_for_selector("#error:visible")
        assert page.error.startswith("decoder.onnx is not as it was exported.")
        shutil.copyfile(whole, tmp_path / "decoder.onnx")
        page.choose(picture)
        page.page.click("#load")
        page.threshold(0).idle()
        assert page.find("dog")["detections"]


def test_files_are_loaded_once_and_threads_follow_the_headers(served: Any, browse: Callable[..., Any]) -> None:
    page = browse(served.url).ready()
    assert page.page.evaluate("crossOriginIsolated") and "threads" in page.page.inner_text("#about")
    served.asked.clear()
    page.page.reload()
    page.ready()
    assert "site.json" in served.asked and not [name for name in served.asked if name.endswith(".onnx")]


def test_what_is_too_large_is_said_before_it_is_loaded(
    site: Site, serving: Callable[..., Any], browse: Callable[..., Any], tmp_path: Path
) -> None:
    import json

    facts = json.loads(site.files["site.json"].read_text())
    (tmp_path / "site.json").write_text(json.dumps({**facts, "too_large": "vision_encoder has 2.5 GB."}))
    with serving(site) as served:
        served.files["site.json"] = tmp_path / "site.json"
        page = browse(served.url)
        page.page.wait_for_selector("#load:visible")
        assert page.error == "vision_encoder has 2.5 GB."
        assert page.page.inner_text("#load") == "Load the model (3.5 MB) all the same"
        assert not [name for name in served.asked if name.endswith(".onnx")]
        page.page.click("#load")
        page.ready()


def test_a_model_that_does_not_fit_at_once_is_opened_a_component_at_a_time(
    site: Site, serving: Callable[..., Any], browse: Callable[..., Any], picture: Path, segmenter: Segmenter, tmp_path: Path
) -> None:
    import json

    facts = json.loads(site.files["site.json"].read_text())
    (tmp_path / "site.json").write_text(json.dumps({**facts, "open_together": 1}))
    with serving(site) as served:
        served.files["site.json"] = tmp_path / "site.json"
        page = browse(served.url).ready().threshold(0)
        page.page.evaluate(HEAR)
        page.choose(picture)
        assert_same(page.find("dog"), segmenter.segment(picture, text="dog", threshold=0).to_dict())
        heard = page.page.evaluate("heard")
        assert "Opening vision_encoder …" in heard and "Opening decoder …" in heard
        assert served.asked.count("vision_encoder.onnx") == 1  # then from the browser's cache


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_a_phone_shows_all_of_it(scheme: str, served: Any, browse: Callable[..., Any], picture: Path) -> None:
    page = browse(served.url, viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True).ready()
    page.threshold(0).choose(picture)
    page.find("dog")
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 360
    paper = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) > 3 * 128) == (scheme == "light")


def test_webgpu_gives_the_same_masks(
    site: Site, serving: Callable[..., Any], gpu_browse: Callable[..., Any], picture: Path, segmenter: Segmenter
) -> None:
    with serving(site) as served:
        page = gpu_browse(served.url).ready().threshold(0)
        assert "WebGPU" in page.page.inner_text("#about")
        page.choose(picture)
        assert_same(page.find("dog"), segmenter.segment(picture, text="dog", threshold=0).to_dict())
