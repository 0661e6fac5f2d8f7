"""The folder of the page: its own files, those of npm, and the exported files, under one manifest."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sam3x.artifact.files import sha256_of
from sam3x.artifact.manifest import MANIFEST, SEGMENTER, PipelineManifest, sealed
from sam3x.artifact.publish import publishing
from sam3x.errors import ArtifactError, SpecError, Step
from sam3x.runtime.manifest import load_manifest
from sam3x.sources.names import DETECTOR, INTERACTIVE_HEAD
from sam3x.web.packages import ORT, PACKAGES, TOKENIZERS, package_folder, version_of

SITE = "site.json"
"""What the page reads first: sizes of the exported files, what can be asked, versions."""

LARGEST_FILE = (1 << 31) - 1
"""Bytes of a file that a browser gives a page in one piece, and that protobuf reads."""

WASM_MEMORY = 1 << 32
"""Bytes that 32-bit WebAssembly can address: weights, and what a component computes."""

OPEN_TOGETHER = 1 << 30
"""Bytes of files whose sessions stay open together; of a larger model one component is open at a time."""

_PAGE = Path(__file__).parent / "page"
_FOLDERS = {ORT.name: "ort", TOKENIZERS.name: "tokenizers"}
_FUSED = (*DETECTOR[:2], SEGMENTER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Every file of the page by the name under which it is served, and where it lies now.

    Attributes:
        too_large: why a browser will not load it, as a sentence; None where nothing is known against it.
    """

    files: Mapping[str, Path]
    too_large: str | None


@contextlib.contextmanager
def opened_site(folder: str | Path, node_modules: Path | None = None) -> Iterator[Site]:
    """The page of an exported pipeline; nothing of the pipeline is copied.

    Args:
        folder: what ``sam3x export --pipeline --target onnx`` wrote, or another site. node_modules: see ``package_folder``.

    Raises:
        ArtifactError: no pipeline, a changed file, or one that the page cannot ask anything.
        SpecError: it was exported to another target than ONNX.
        TargetUnavailableError: onnxruntime-web or the tokenizers cannot be had.
    """
    root = Path(folder)
    manifest = load_manifest(root)
    if manifest.target != "onnx":
        fact = f"a browser runs ONNX files, and {root} was exported to '{manifest.target}'"
        raise SpecError(fact, remedy="Export with --target onnx.", step=Step.WEB)
    words, clicks = _questions(root, manifest)
    with tempfile.TemporaryDirectory(prefix="sam3x-web-") as name:
        scratch = Path(name)
        files = {path.name: path for path in sorted(_PAGE.iterdir())}
        versions: dict[str, str] = {}
        for index, package in enumerate(PACKAGES):
            (scratch / str(index)).mkdir()
            source = package_folder(package, node_modules, scratch / str(index))
            files |= {f"{_FOLDERS[package.name]}/{Path(item).name}": source / item for item in package.files}
            versions[package.name] = version_of(source)
        exported = {item: root / item for item in _exported(manifest)}
        taken = sorted(exported.keys() & {*files, SITE})
        if taken:
            fact = f"the page has a file named '{taken[0]}' of its own"
            raise SpecError(fact, remedy="Export into another folder.", step=Step.WEB)
        sizes = {item: path.stat().st_size for item, path in exported.items()}
        too_large = _too_large(manifest, sizes)
        asked = {"words": words, "clicks": clicks, "too_large": too_large}
        facts = {"versions": versions, "bytes": sizes, "open_together": OPEN_TOGETHER, **asked}
        (scratch / SITE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        files |= {**exported, SITE: scratch / SITE}
        known = manifest.files  # their hashes have just been compared
        hashes = {item: known[item] if item in exported else sha256_of(path) for item, path in files.items()}
        (scratch / MANIFEST).write_text(sealed(manifest.model_copy(update={"files": hashes})), encoding="utf-8")
        yield Site(files={**files, MANIFEST: scratch / MANIFEST}, too_large=too_large)


def write_site(site: Site, output: str | Path) -> None:
    """Copy ``site`` into a folder, whole or not at all; files of an earlier one go, the user's own stay.

    Raises:
        ArtifactError: the folder cannot be written, is full, or holds a file of the user's.
    """
    with publishing(output, sorted(site.files)) as publication:
        for name, source in site.files.items():
            target = publication.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        publication.commit()


def _questions(root: Path, manifest: PipelineManifest) -> tuple[bool, bool]:
    """Whether the page can be asked by words and boxes, and by clicks."""
    names = {item.name for item in manifest.components}
    whole = names.issuperset(_FUSED if manifest.fused else DETECTOR)
    words = whole and manifest.tokenizer is not None
    clicks = manifest.clicks is not None and names.issuperset((DETECTOR[0], INTERACTIVE_HEAD))
    if not words and not clicks:
        lacks, remedy = ("has no tokenizer", "give --tokenizer FILE") if whole else ("is not whole", "leave --components out")
        raise ArtifactError(f"{root} {lacks}, so the page could ask nothing", remedy=f"Export again: {remedy}.", step=Step.WEB)
    return words, clicks


def _exported(manifest: PipelineManifest) -> Iterator[str]:
    """The files of the components, and the vocabulary."""
    for item in manifest.components:
        yield item.file
        if _weights(item.file) in manifest.files:
            yield _weights(item.file)
    if manifest.tokenizer is not None:
        yield manifest.tokenizer


def _weights(file: str) -> str:
    return f"{file}.data"


def _too_large(manifest: PipelineManifest, sizes: Mapping[str, int]) -> str | None:
    """Components are in memory one at a time where they must be, so the largest one decides."""
    of_component = {item.name: sizes[item.file] + sizes.get(_weights(item.file), 0) for item in manifest.components}
    name = max(of_component, key=lambda item: of_component[item])
    file, most = max(sizes.items(), key=lambda item: item[1])
    remedy = "Export with --weights int8 or --precision fp16, or choose a smaller model."
    if most > LARGEST_FILE:
        return f"{file} has {most / 1e9:.1f} GB, and a browser gives a page 2.1 GB in one piece. {remedy}"
    if 2 * of_component[name] > WASM_MEMORY:
        size = f"{of_component[name] / 1e9:.1f} GB"
        return f"{name} has {size}, and with what it computes that is more than the 4.3 GB of a tab. {remedy}"
    return None
