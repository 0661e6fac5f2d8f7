"""A page in a browser as a person uses it, and its answers against those of ``Segmenter``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SECONDS = 120_000
"""In milliseconds, for whatever the page does: other workers have the cores too."""


@dataclass
class Served:
    """A page's address; ``files`` may be changed while it is served."""

    url: str
    files: dict[str, Path]
    asked: list[str] = field(default_factory=list)


@dataclass
class Browsed:
    """The page as a person sees it."""

    page: Any

    def ready(self) -> Browsed:
        """Wait until the model is loaded; what is wrong with it is the test's failure."""
        loaded = "() => document.getElementById('words').textContent.startsWith('Ready')"
        self.page.wait_for_function(f"{loaded.removeprefix('() => ')} || !document.getElementById('error').hidden")
        assert self.error == ""
        return self

    def choose(self, *files: Path) -> Browsed:
        self.page.set_input_files("#file", [str(file) for file in files])
        return self

    def idle(self) -> Browsed:
        """Wait until nothing is computed or queued."""
        self.page.wait_for_function("document.getElementById('progress').hidden")
        return self

    def threshold(self, value: float) -> Browsed:
        self.page.locator("#threshold").evaluate(f"(slider) => {{ slider.value = {value}; slider.oninput(); }}")
        return self

    def find(self, words: str) -> dict[str, Any]:
        """Type words and press Enter."""
        self.page.fill("#text", words)
        self.page.press("#text", "Enter")
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for what was asked, and save it as JSON."""
        self.idle()
        assert self.error == ""
        with self.page.expect_download() as download:
            self.page.click("#save-json")
        return json.loads(Path(download.value.path()).read_text())

    def drag(self, *corners: float) -> None:
        """Draw from corner to corner, in fractions of the picture."""
        edge = self.page.locator("#over").bounding_box()
        x0, y0, x1, y1 = (
            edge["xy"[index % 2]] + value * edge[("width", "height")[index % 2]] for index, value in enumerate(corners)
        )
        self.page.mouse.move(x0, y0)
        self.page.mouse.down()
        self.page.mouse.move((x0 + x1) / 2, (y0 + y1) / 2)
        self.page.mouse.move(x1, y1)
        self.page.mouse.up()

    def marks(self) -> list[list[float]]:
        """The pixels of what was drawn, as the page lists them."""
        rows = self.page.locator("#marks li").all_inner_texts()
        return [[float(word) for word in row.replace(",", " ").split() if word.replace(".", "").isdigit()] for row in rows]

    @property
    def error(self) -> str:
        return self.page.inner_text("#error") if self.page.is_visible("#error") else ""


def masks(document: dict[str, Any]) -> list[np.ndarray]:
    """Masks (height, width) of what ``sam3x run --json`` or the page wrote."""
    found = []
    for item in document["detections"]:
        (height, width), counts = item["mask"]["size"], item["mask"]["counts"]
        found.append(np.repeat(np.arange(len(counts)) % 2, counts).reshape(width, height).T.astype(bool))
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any], iou: float = 0.999) -> None:
    """Labels are the same, scores, boxes and masks equal up to float32 of another order of sums."""
    assert len(found["detections"]) == len(expected["detections"]) > 0
    for one, other in zip(found["detections"], expected["detections"], strict=True):
        assert (one["label"], one["prompt"]) == (other["label"], other["prompt"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-4 if iou > 0.99 else 1e-2)
        assert one["box"] == pytest.approx(other["box"], abs=0.1 if iou > 0.99 else 5)
    for one, other in zip(masks(found), masks(expected), strict=True):
        assert (one & other).sum() >= iou * (one | other).sum()
