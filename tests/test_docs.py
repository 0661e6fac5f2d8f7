"""The pages: the site builds with every link and reference, and the walk-through's code runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_site_builds_with_every_link_and_reference(tmp_path: Path) -> None:
    package = tmp_path / "tree" / "sam3x"
    package.mkdir(parents=True)
    for item in [*(ROOT / "exporter").iterdir(), ROOT / "passes", ROOT / "targets"]:
        (package / item.name).symlink_to(item)
    config = (ROOT / "mkdocs.yml").read_text().replace("build/typing", str(package.parent))
    (tmp_path / "mkdocs.yml").write_text(config.replace("docs_dir: docs", f"docs_dir: {ROOT / 'docs'}"))
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(tmp_path / "mkdocs.yml"), "-d", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").exists()


def test_every_decision_is_in_the_index() -> None:
    pages = {path.name for path in (ROOT / "docs" / "decisions").glob("0*.md")}
    assert pages == set(re.findall(r"\]\((0[\w-]+\.md)\)", (ROOT / "docs" / "decisions" / "index.md").read_text()))


def test_files_that_pages_name_are_there_and_define_what_is_said_of_them() -> None:
    lacking = []
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        for name in re.findall(r"`((?:exporter|passes|targets|tests)/[\w/*]+\.py)", text):
            lacking += [] if list(ROOT.glob(name)) else [f"{page.name}: {name}"]
        for names, path in re.findall(r"((?:`[\w.]+`,? )+)\(`([\w/*]+\.py)`\)", text):
            code = "\n".join(item.read_text() for item in ROOT.glob(path))
            found = {
                name for name in re.findall(r"\w+(?=`)", names) if re.search(rf"(?:def |class |^){name}\b", code, re.MULTILINE)
            }
            lacking += [f"{page.name}: {name} in {path}" for name in re.findall(r"\w+(?=`)", names) if name not in found]
    assert lacking == []


def test_the_code_of_the_walk_through_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "walkthrough-encoder.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "walkthrough"}
    for block in blocks:
        exec(compile(block, "walkthrough-encoder.md", "exec"), names)
    rewrites = {record.name: record.rewrites for record in names["artifact"].manifest.passes}  # type: ignore[attr-defined]
    assert rewrites["canonicalize_attention"] == 2 and rewrites["tile_attention"] == 4
    assert names["outputs"]["output"].shape == (2, 36, 64)  # type: ignore[index]
