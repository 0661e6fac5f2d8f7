"""The house rules: what the wheel holds, which way imports go, what ``import sam3x`` costs, what no file may say."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"exporter": "sam3x", "passes": "sam3x.passes", "targets": "sam3x.targets"}


def module_name(path: Path) -> str:
    """``passes/graph/axes.py`` → ``sam3x.passes.graph.axes``."""
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[top], *rest]).removesuffix(".__init__")


SOURCES = {module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


# ---- the wheel


def test_the_wheel_holds_exactly_the_three_folders(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a copy: an old build/lib beside the sources would end up in the wheel
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "sam3x = sam3x.cli.app:main" in archive.read(entry_points).decode()
    expected = {
        f"{FOLDERS[path.relative_to(tree).parts[0]].replace('.', '/')}/{'/'.join(path.relative_to(tree).parts[1:])}"
        for folder in FOLDERS
        for path in (tree / folder).rglob("*")
        if path.is_file()
    }
    assert packed == expected


# ---- imports go one way

ROOMS = (
    "cli", "bench", "demo", "fidelity", "api", "pipeline", "precision", "web", "runtime", "artifact", "targets", "verify",
    "passes", "capture", "sources", "fusion", "spec", "pages", "errors", "warning_filters",
)  # fmt: skip
"""From the top floor down; a room imports only itself and what stands below it. ``docs/architecture.md`` says why."""

PASSES = ("", "attention", "branches", "linear", "cleanup", "decompose", "precision", "graph", "base")
"""The same inside ``passes``; ``""`` are the pipelines."""

TARGETS = ("registry", "tensorrt", "onnx", "executorch", "triton", "quiet", "base")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import statement, those inside functions and ``if TYPE_CHECKING`` too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, item.name) for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            for item in node.names:  # ``from sam3x import api`` names a module, ``from sam3x.api import export`` does not
                full = f"{node.module}.{item.name}"
                yield node.lineno, full if full in SOURCES else str(node.module)


def floor(name: str) -> tuple[int, int]:
    """How far down a module stands: its room, and the room within ``passes`` or ``targets``."""
    room, _, inner = name.removeprefix("sam3x").removeprefix(".").partition(".")
    if room in ("", "__main__"):
        return -1, 0
    inside = {"passes": PASSES, "targets": TARGETS}.get(room)
    part = inner.partition(".")[0]
    return ROOMS.index(room), 0 if inside is None else inside.index(part) if part in inside else 0


def breaches(sources: dict[str, Path]) -> list[str]:
    found = []
    for name, path in sources.items():
        for line, target in imported(path):
            if target == "sam3x" and floor(name)[0] <= ROOMS.index("api"):
                continue  # the version
            if target.partition(".")[0] in FOLDERS:
                found.append(f"{path.name}:{line} imports the folder {target}")
            elif target.partition(".")[0] == "sam3x" and floor(target) < floor(name):
                found.append(f"{name}, line {line}, imports {target}, which stands above it")
    return found


def test_imports_go_one_way() -> None:
    assert breaches(SOURCES) == []


def test_no_two_modules_import_each_other() -> None:
    graph = {name: {target for _, target in imported(path)} & SOURCES.keys() - {name} for name, path in SOURCES.items()}
    order = TopologicalSorter({name: targets for name, targets in graph.items() if SOURCES[name].name != "__init__.py"})
    order.prepare()  # raises CycleError, which names the circle


def test_every_room_says_what_it_is_for() -> None:
    fronts = {name: path for name, path in SOURCES.items() if path.name == "__init__.py"}
    silent = [name for name, path in fronts.items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("passes", "def f():\n    from sam3x.targets.base import Target"),
        ("passes", "from sam3x import api"),
        ("passes", "import sam3x.cli.app as c"),
        ("passes", "from sam3x import export"),
        ("passes/graph", "from sam3x.passes.attention import rewrite"),
        ("passes/linear", "from sam3x.passes.default_pipeline import default_pipeline"),
        ("targets", "from sam3x.artifact.artifact import load"),
        ("targets/onnx", "from sam3x.targets.tensorrt import build"),
        ("exporter/capture", "if X:\n    from sam3x.passes import base"),
        ("exporter/capture", "import passes.base"),
        ("exporter/fusion", "from sam3x.pipeline import export"),
        ("exporter/runtime", "from sam3x.pipeline.request import PROMPTS"),
        ("exporter/pipeline", "from sam3x.cli import app"),
    ],
)
def test_a_wrong_import_is_found(folder: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / folder / "wrong.py"
    path.parent.mkdir(parents=True)
    path.write_text(line)
    top, *rest = folder.split("/")
    assert len(breaches({".".join([FOLDERS[top], *rest, "wrong"]): path})) == 1


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("folder", ["passes", "targets"])
def test_a_folder_is_not_importable_by_its_own_name(folder: str) -> None:
    done = python(f"import {folder}")  # -c puts the repository root first on sys.path
    assert done.returncode == 1 and f"import this package as 'sam3x.{folder}'" in done.stderr


def test_importing_sam3x_imports_nothing_but_the_standard_library() -> None:
    code = "import sys; old = set(sys.modules); import sam3x; print({m.partition('.')[0] for m in set(sys.modules) - old})"
    done = python(code)
    assert ast.literal_eval(done.stdout) - set(sys.stdlib_module_names) == {"sam3x"}, done.stderr


def test_loading_and_describing_targets_imports_no_torch() -> None:
    done = python("import sys; from sam3x.targets import registry; registry.describe_targets(); print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


# ---- errors


def typed_steps(path: Path) -> list[str]:
    """Where a file types what ``sam3x.errors`` alone puts into words."""
    strings = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    return [f"{path.name}:{node.lineno}" for node in strings if re.match(r"\s*step \d/\d", str(node.value))]


def test_the_words_of_a_step_are_typed_in_one_place() -> None:
    assert [name for name, path in SOURCES.items() if typed_steps(path)] == ["sam3x.errors"]


@pytest.mark.parametrize("line", ['raise SpecError("step 1/4 spec: no")', 'raise PassError(f"step 3/4 passes: {name}")'])
def test_a_typed_step_is_found(line: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(line)
    assert typed_steps(path) == ["wrong.py:1"]


# ---- text

FORBIDDEN = {
    "a path of one machine": r"(?<![\w.<])/(?:work|root|home|Users)/\w",
    "an index address": r"(?:--(?:extra-)?index-url|PIP_INDEX_URL|/simple\b|https?://(?:localhost|\d+\.\d+\.\d+\.\d+))",
}


def tracked() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_file_names_a_machine_or_an_index() -> None:
    found = []
    for path in tracked():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            found += [
                f"{path.relative_to(ROOT)}:{number}: {what}" for what, pattern in FORBIDDEN.items() if re.search(pattern, line)
            ]
    assert found == []


def test_the_changelog_has_the_version_or_an_unreleased_part() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text


@pytest.mark.parametrize(
    "page", sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_pages_name_only_files_that_exist() -> None:
    missing = []
    for path in [ROOT / "README.md", ROOT / "docs" / "architecture.md"]:
        named = re.findall(r"`((?:exporter|passes|targets|tests|docs)/[\w/.-]+\.(?:py|md))`", path.read_text())
        missing += [f"{path.name}: {name}" for name in named if not (ROOT / name).exists()]
    assert missing == []


def test_the_page_of_options_is_what_the_command_says() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "options_table.py"))["page"]()
    assert page == (ROOT / "docs" / "options.md").read_text(), "python docs/options_table.py writes it again"
