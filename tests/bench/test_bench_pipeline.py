"""``sam3x bench-pipeline`` on a small pipeline and its own source."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sam3x.cli.app import app
from sam3x.pipeline.export import ComponentJob, export_pipeline
from sam3x.sources.image import random_image_source
from sam3x.sources.names import COMPONENTS
from support.image_model import TINY

FACTORY = """
import sys
sys.path.insert(0, {tests!r})
from support.image_model import tiny_image_model

def made(seed=5):
    return tiny_image_model({vocabulary!r}, seed)

def other():
    return made(6)
"""


@pytest.fixture
def factory(tmp_path: Path, tiny_vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = FACTORY.format(tests=str(Path(__file__).parents[1]), vocabulary=str(tiny_vocabulary))
    (tmp_path / "small_image_model.py").write_text(made)
    monkeypatch.chdir(tmp_path)


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench-pipeline", *arguments, "--repeat", "1", "--threads", "1", "--threshold", "0.1"])


@pytest.mark.usefixtures("factory")
def test_a_pipeline_and_its_source_find_the_same(tiny_pipeline: Path) -> None:
    done = bench(str(tiny_pipeline), "--module", "small_image_model:made", "--json", "--quiet", "--markdown", "page.md")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    ours, eager = report["contenders"]["pipeline"], report["contenders"]["eager"]
    assert ours["detections"] == eager["detections"] > 0 and report["largest_score_gap"] < 1e-5
    assert report["ratio"] == pytest.approx(ours["seconds"][0] / eager["seconds"][0])
    assert 0 < ours["peak_mb"] < eager["peak_mb"] and ours["start_seconds"] > 0
    assert report["export"]["peak_rss_mb"] > 0
    page = Path("page.md").read_text()
    assert "sam3x bench-pipeline" in page and "--module small_image_model:made" in page and "| eager |" in page
    assert all(f"| `{name}` |" in page for name in COMPONENTS)


@pytest.mark.usefixtures("factory")
def test_a_click_is_measured_against_upstreams_own_two_calls(tiny_pipeline: Path) -> None:
    done = bench(str(tiny_pipeline), "--module", "small_image_model:made", "--click", "--json", "-q", "--markdown", "page.md")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["contenders"]["pipeline"]["detections"] == 3 and report["largest_score_gap"] < 1e-5
    assert report["contenders"]["pipeline"]["run_mb"] < report["contenders"]["pipeline"]["peak_mb"]
    assert report["cpu_ratio"] > 0
    page = Path("page.md").read_text()
    assert "one click on its middle" in page and "--click" in page


@pytest.mark.usefixtures("factory")
def test_another_source_is_refused(tiny_pipeline: Path) -> None:
    done = bench(str(tiny_pipeline), "--module", "small_image_model:other", "--quiet")
    assert done.exit_code == 2 and "other weights" in " ".join(done.output.split())


def test_a_component_is_gone_before_the_next_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest comes last, and by then no weight of another is in memory."""
    weights: dict[str, Any] = {}

    def exported(self: ComponentJob, component: Any, *cases: list[Any]) -> Any:
        gc.collect()
        assert not [name for name, value in weights.items() if value() is not None]
        sizes.append(sum(value.nbytes for value in component.module.parameters()))
        weights[component.name] = weakref.ref(next(component.module.parameters()))
        raise_after = len(sizes) == 6
        if raise_after:
            raise KeyboardInterrupt
        return None

    sizes: list[int] = []
    monkeypatch.setattr(ComponentJob, "export", exported)
    with pytest.raises(KeyboardInterrupt):
        export_pipeline(random_image_source(TINY), output=tmp_path / "out")
    assert sizes == sorted(sizes) and len(weights) == 6
