"""Publishing an export into a folder that may hold an earlier one and the user's own files, whole or not at all.

The new files are written into a hidden folder inside the output folder, on the same disk. Renaming that folder to
``journal.JOURNAL`` commits them: before it the earlier export is untouched, after it the new one is complete, whatever happens.
What is left is to move each file to its place; a process that dies on the way leaves the journal, and the next ``load`` or
export finishes the move. POSIX has no call that replaces several files at once; swapping the whole folder
(``RENAME_EXCHANGE``) exists on Linux only and would move the user's own files and break mounts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from sam3x.artifact.files import is_inside, link_in, names_in, sha256_of
from sam3x.artifact.journal import DISK_ERRORS, NEW, STAGING, commit, finish
from sam3x.artifact.lock import locked
from sam3x.artifact.manifest import MANIFEST, names_written, read_manifest, sealed
from sam3x.errors import ArtifactError, SpecError, Step


@dataclass(frozen=True)
class Publication:
    """An export on its way: write into ``path``, then ``commit``."""

    folder: Path
    path: Path

    def commit(self) -> None:
        """Put the files in ``path`` into ``folder``; the files of an earlier export go, all others stay.

        Raises:
            ArtifactError: something of the user's stands in the way, or a file cannot be moved; all is as it was.
        """
        names = names_in(self.path)
        for name in names:
            _check_free(self.folder, name)
        _check_own(self.folder, names, Step.WRITE)
        try:
            obsolete = [name for name in _earlier_files(self.folder) if name not in names]
            commit(self.path.parent, self.folder, obsolete)
        except OSError as error:
            fact = f"{self.folder} cannot be written ({error.strerror}); what was there is as it was"
            raise ArtifactError(fact, remedy="Free space, or choose another --output.", step=Step.WRITE) from error


@contextlib.contextmanager
def publishing(folder: str | Path, names: Sequence[str] = (MANIFEST,)) -> Iterator[Publication]:
    """A ``Publication`` into ``folder``, which nobody else exports into meanwhile; after an error nothing of it is left.

    Args:
        names: files that will be written, as far as they are known: one of the user's in the way is told at once.

    Raises:
        SpecError: the name of the folder is empty.
        ArtifactError: the folder cannot be written, is full, holds a file of the user's, or another export holds it.
    """
    if not str(folder).strip():
        raise SpecError("the output folder has an empty name", remedy="Name a folder; the current one is '.'.")
    shown = Path(folder)
    root = shown.resolve() if shown.is_dir() else shown  # a link to a folder is followed once, here
    made = [path for path in (root, *root.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        try:
            _make_folder(root)
            stack.enter_context(locked(root))
            finish(root)
            _check_own(root, names, Step.SPEC)
            for left in root.glob(f"{STAGING}*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
            staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=root))
            (staging / NEW).mkdir()
        except BlockingIOError as error:
            raise ArtifactError(
                f"another export is writing into {shown}", remedy="Wait for it, or choose another --output.", step=Step.SPEC
            ) from error
        except OSError as error:
            _remove_empty(made)
            raise ArtifactError(
                f"{shown} cannot be written ({error.strerror})", remedy="Choose another --output.", step=Step.SPEC
            ) from error
        try:
            yield Publication(folder=root, path=staging / NEW)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            _remove_empty(made)
            disk = _disk_error(error)
            if disk is not None:
                fact = f"{shown} cannot be written ({disk.strerror}); what was there is as it was"
                raise ArtifactError(fact, remedy="Free space, or choose another --output.", step=Step.WRITE) from error
            raise
        shutil.rmtree(staging, ignore_errors=True)


def replace_manifest(folder: Path, manifest: BaseModel) -> None:
    """Write what became known of an export later, as when it is verified on another machine.

    Raises:
        ArtifactError: it cannot be written, or somebody exports into the folder; the earlier manifest stays.
    """
    whole = folder / f"{STAGING}{MANIFEST}"
    try:
        with locked(folder):
            try:
                whole.write_text(sealed(manifest))
                os.replace(whole, folder / MANIFEST)
            finally:
                whole.unlink(missing_ok=True)
    except OSError as error:
        fact = "an export is writing into it" if isinstance(error, BlockingIOError) else error.strerror
        raise ArtifactError(
            f"{folder / MANIFEST} cannot be written ({fact}); it is as it was", remedy="Try again.", step=Step.REVERIFY
        ) from error


def _check_free(folder: Path, name: str) -> None:
    """Refuse to write over a folder, or through a link to somewhere else."""
    link = link_in(folder, str(Path(name).parent)) if "/" in name else None
    if link is not None:
        raise ArtifactError(
            f"{link} is a symbolic link, and '{name}' would be written through it", remedy="Remove it.", step=Step.WRITE
        )
    for path in (folder / name, *(folder / name).parents):
        if path == folder:
            return
        in_the_way = path.is_dir() and not path.is_symlink() if path == folder / name else path.exists() and not path.is_dir()
        if in_the_way:
            kind = "folder" if path.is_dir() else "file"
            raise ArtifactError(
                f"{path} is a {kind}, where '{name}' has to go", remedy="Move it, or choose another --output.", step=Step.WRITE
            )


def _check_own(folder: Path, names: Sequence[str], step: Step) -> None:
    """Refuse to write over a file that no export wrote."""
    found = [name for name in names if os.path.lexists(folder / name)]
    strange = sorted(set(found) - names_written(folder)) if found else []
    if strange:
        raise ArtifactError(
            f"{', '.join(str(folder / name) for name in strange)} would be overwritten, and no export of sam3x wrote it",
            remedy="Move it, or choose another --output.",
            step=step,
        )


def _earlier_files(folder: Path) -> list[str]:
    """Files of the export that stands in ``folder``, as they were written: what was changed since is the user's."""
    try:
        files = read_manifest(folder).files
    except ArtifactError:
        return []
    return [
        name
        for name, expected in files.items()
        if is_inside(name)
        and link_in(folder, name) is None
        and (folder / name).is_file()
        and sha256_of(folder / name) == expected
    ]


def _make_folder(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise NotADirectoryError(0, "it is a link to nothing" if folder.is_symlink() else "it is a file")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(0, "no permission")


def _disk_error(error: BaseException | None) -> OSError | None:
    """The full or failing disk behind an error that a library wrapped."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # innermost first
        with contextlib.suppress(OSError):
            folder.rmdir()
