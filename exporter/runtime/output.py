"""What leaves the runtime: run lengths of a mask, and files."""

from __future__ import annotations

from collections.abc import Callable
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
    """``write(path)``.

    Raises:
        ArtifactError: the folder does not exist, the disk is full, the extension names no format.
    """
    try:
        write(Path(path))
    except (OSError, ValueError, TypeError) as error:  # Pillow: unknown extension; a path that is none
        fact = getattr(error, "strerror", None) or str(error)
        remedy = "Name a file in a folder that exists." if isinstance(error, FileNotFoundError) else ""
        raise ArtifactError(f"{path} cannot be written ({fact})", remedy=remedy, step=Step.RUN) from error
