"""Exported folders as tests need them: what is in one, a manifest edited by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sam3x.artifact.files import names_in, sha256_of
from sam3x.artifact.manifest import MANIFEST, ComponentSpec, Manifest, PipelineManifest, read_manifest, sealed

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
"""The fixture ``made_once``."""


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
    kind = PipelineManifest if values["kind"] == "pipeline" else Manifest
    path.write_text(sealed(kind.model_validate(values)) if seal else json.dumps(values))


def altered(folder: Path, to: Path, **fields: Any) -> Path:
    """A copy of an export whose manifest has other values, sealed anew."""
    shutil.copytree(folder, to)
    (to / MANIFEST).write_text(sealed(read_manifest(folder).model_copy(update=fields)))
    return to


def write_export(folder: Path, files: dict[str, bytes]) -> None:
    """An export as far as its folder goes: these files and a manifest that names them."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    hashes = {name: sha256_of(folder / name) for name in names_in(folder) if name in files}
    component = ComponentSpec(name="fusion_encoder", file=next(iter(files)), inputs=(), outputs=(), reads={}, writes={})
    manifest = Manifest(target="onnx", components=(component,), origin="a test", weights_sha256="0", versions={}, files=hashes)
    (folder / MANIFEST).write_text(sealed(manifest))
