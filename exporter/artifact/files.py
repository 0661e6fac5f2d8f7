"""The files a manifest names: their hashes, and the names that may stand in it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import BinaryIO

_PIECE = 1 << 20


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as stream:
        return _digest(stream)


def _digest(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := stream.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def names_in(folder: Path) -> list[str]:
    """Relative names of everything in ``folder`` that is no folder, nested ones too (``1/model.plan``), sorted."""
    found = []
    for parent, _, files in os.walk(folder):
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in files]
    return sorted(found)


def is_inside(name: str) -> bool:
    """Whether ``name`` is a plain relative name: no root, no ``..``, nothing that two spellings share."""
    path = PurePosixPath(name)
    plain = bool(name) and "\0" not in name and "\\" not in name
    return plain and not path.is_absolute() and path.as_posix() == name and ".." not in path.parts and path.parts != ()


def link_in(root: Path, name: str) -> Path | None:
    """The first symbolic link on the way from ``root`` to ``root/name``; None when there is none."""
    path = root
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            return path
    return None
