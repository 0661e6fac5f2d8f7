"""Exported folders as tests need them: what is in one, a manifest edited by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sam3x.artifact.files import names_in, sha256_of
from sam3x.artifact.manifest import MANIFEST, ExportManifest, sealed
from sam3x.runtime.manifest import PipelineManifest


def contents(folder: Path) -> dict[str, bytes | str]:
    """Relative name → bytes of every file, target of every link; hidden files too."""
    return {
        path.relative_to(folder).as_posix(): f"-> {path.readlink()}" if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def edit_manifest(folder: Path, *, seal: bool, **changes: Callable[[Any], Any]) -> None:
    """Change fields of a manifest; ``seal``: with its own hash put right, as somebody would who knows how."""
    path = folder / MANIFEST
    values = json.loads(path.read_text())
    for name, change in changes.items():
        values[name] = change(values[name])
    path.write_text(sealed(ExportManifest.model_validate(values)) if seal else json.dumps(values))


def edit_pipeline(folder: Path, *, seal: bool, **values: Any) -> None:
    """The same of a pipeline's manifest, by values."""
    path = folder / MANIFEST
    changed = {**json.loads(path.read_text()), **values}
    path.write_text(sealed(PipelineManifest.model_validate(changed)) if seal else json.dumps(changed))


def write_export(folder: Path, files: dict[str, bytes]) -> None:
    """An export as far as its folder goes: these files and a manifest that names them."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    hashes = {name: sha256_of(folder / name) for name in names_in(folder) if name in files}
    manifest = ExportManifest(
        target="onnx",
        interface="tokens",
        input_names=("tgt",),
        output_names=("output",),
        inputs=(),
        outputs=(),
        spec={},
        ranges={},
        origin="a test",
        weights_sha256="0",
        versions={},
        passes=(),
        files=hashes,
    )
    (folder / MANIFEST).write_text(sealed(manifest))
