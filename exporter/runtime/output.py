"""What leaves the runtime: run lengths of a mask, and files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sam3x.errors import ArtifactError, Step


def run_lengths(mask: np.ndarray) -> np.ndarray:
    """Lengths of the runs of equal values, column by column, the first of zeros (it may be 0): COCO's uncompressed RLE.

    (height, width) bool → (runs,) uint32.
    """
    flat = mask.T.ravel()
    starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0] if flat[0] else [], [0], starts, [flat.size]])
    return np.diff(edges).astype(np.uint32)


def written(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: ``write`` is given a hidden name beside ``path``, which becomes ``path`` at the end.

    What is no regular file, a pipe or a device, is written into as it stands.

    Raises:
        ArtifactError: the folder does not exist, the disk is full, the extension names no format.
    """
    with told(path):
        file = Path(path).resolve()  # of a link, the file it leads to
        if file.exists() and not file.is_file():
            write(file)
            return
        part = file.with_name(f".part-{file.name}")
        try:
            write(part)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)


def made_folder(path: str | Path) -> Path:
    """The folder ``path``, made where there is none.

    Raises:
        ArtifactError: it cannot be made.
    """
    with told(path):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


@contextlib.contextmanager
def told(path: str | Path) -> Iterator[None]:
    """What a disk or an encoder raises as an ``ArtifactError`` that names ``path``."""
    try:
        yield
    except (OSError, ValueError, TypeError) as error:  # Pillow: unknown extension; a path that is none
        fact = getattr(error, "strerror", None) or str(error)
        remedy = "Name a file in a folder that exists." if isinstance(error, FileNotFoundError) else ""
        raise ArtifactError(f"{path} cannot be written ({fact})", remedy=remedy, step=Step.RUN) from error
