"""Publishing an export into a folder that may hold an earlier one and the user's own files, whole or not at all.

The new files are written into a hidden folder inside the output folder, on the same disk. One ``rename`` of that folder to
``JOURNAL`` commits them: before it the earlier export is untouched, after it the new one is complete, whatever happens. What
is left is to move each file to its place; a process that dies on the way leaves the journal, and the next ``load`` or export
finishes the move (``recover``). POSIX has no call that replaces several files at once; swapping the whole folder
(``RENAME_EXCHANGE``) exists on Linux only and would move the user's own files and break mounts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sam3x.errors import ArtifactError
from sam3x.manifest import MANIFEST, ExportManifest, read_manifest, sealed
from sam3x.manifest_files import is_inside, link_in, names_in, sha256_of

try:
    import fcntl
except ImportError:  # Windows runs artifacts; exports are made on Linux and macOS
    fcntl = None  # type: ignore[assignment]

JOURNAL = ".sam3x-commit"
STAGING = ".sam3x-staging-"
_NEW, _EARLIER, _PLAN = "new", "earlier", "plan.json"
_WAIT = 10.0  # seconds; moving the files takes milliseconds
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


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
        try:
            self._commit(names)
        except OSError as error:
            fact = f"{self.folder} cannot be written ({error.strerror}); what was there is as it was"
            raise ArtifactError(f"step 4/4 write: {fact}. Free space, or choose another --output.") from error

    def _commit(self, names: list[str]) -> None:
        obsolete = [name for name in _earlier_files(self.folder) if name not in names]
        root = self.path.parent
        (root / _EARLIER).mkdir()
        (root / _PLAN).write_text(json.dumps({"new": names, "obsolete": obsolete}))
        for name in names:
            _sync(self.path / name)
        _sync(root / _PLAN)
        for parent in {(self.path / name).parent for name in names} | {root}:
            _sync(parent)
        os.rename(root, self.folder / JOURNAL)
        _sync(self.folder)
        try:
            _forward(self.folder)
        except OSError:
            _back(self.folder)
            raise


@contextlib.contextmanager
def publishing(folder: str | Path) -> Iterator[Publication]:
    """A ``Publication`` into ``folder``, which nobody else exports into meanwhile; after an error nothing of it is left.

    Raises:
        ArtifactError: the folder cannot be written, is full, or another export holds it.
    """
    shown = Path(folder)
    root = shown.resolve() if shown.is_dir() else shown  # a link to a folder is followed once, here
    made = [path for path in (root, *root.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        try:
            _make_folder(root)
            stack.enter_context(_locked(root))
            _recover(root)
            for left in root.glob(f"{STAGING}*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
            staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=root))
            (staging / _NEW).mkdir()
        except BlockingIOError as error:
            raise ArtifactError(
                f"step 1/4 spec: another export is writing into {shown}. Wait for it, or choose another --output."
            ) from error
        except OSError as error:
            _remove_empty(made)
            raise ArtifactError(
                f"step 1/4 spec: {shown} cannot be written ({error.strerror}). Choose another --output."
            ) from error
        try:
            yield Publication(folder=root, path=staging / _NEW)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            _remove_empty(made)
            disk = _disk_error(error)
            if disk is not None:
                fact = f"{shown} cannot be written ({disk.strerror}); what was there is as it was"
                raise ArtifactError(f"step 4/4 write: {fact}. Free space, or choose another --output.") from error
            raise
        shutil.rmtree(staging, ignore_errors=True)


def replace_manifest(folder: Path, manifest: ExportManifest) -> None:
    """Write what became known of an export later, as when it is verified on another machine.

    Raises:
        ArtifactError: it cannot be written, or somebody exports into the folder; the earlier manifest stays.
    """
    whole = folder / f"{STAGING}{MANIFEST}"
    try:
        with _locked(folder):
            try:
                whole.write_text(sealed(manifest))
                os.replace(whole, folder / MANIFEST)
            finally:
                whole.unlink(missing_ok=True)
    except OSError as error:
        fact = "an export is writing into it" if isinstance(error, BlockingIOError) else error.strerror
        raise ArtifactError(f"verify: {folder / MANIFEST} cannot be written ({fact}); it is as it was. Try again.") from error


def recover(folder: Path) -> None:
    """Finish what a killed export had committed.

    Raises:
        ArtifactError: the files cannot be moved (a folder that may only be read).
    """
    deadline = time.monotonic() + _WAIT
    while os.path.lexists(folder / JOURNAL):
        try:
            with _locked(folder):
                _recover(folder)
        except BlockingIOError as error:  # another process is moving the files, or an export has begun that does so first
            if time.monotonic() >= deadline:
                raise ArtifactError(
                    f"load: another process has been writing into {folder} for {_WAIT:.0f} s. Try again."
                ) from error
            time.sleep(0.02)
        except OSError as error:
            raise ArtifactError(
                f"load: an export into {folder} was interrupted after it was complete, and its files cannot be moved into "
                f"place ({error.strerror}). Load it once where {folder} can be written."
            ) from error


def _recover(folder: Path) -> None:
    if (folder / JOURNAL).is_dir():
        _forward(folder)


def _forward(folder: Path) -> None:
    """Move every new file into place, the manifest last; may be repeated from wherever it stopped."""
    journal = folder / JOURNAL
    plan = _read_plan(journal)
    waiting = set(names_in(journal / _NEW))
    for name in sorted(plan["new"], key=lambda item: item == MANIFEST):
        if name in waiting:
            _keep(folder, name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(journal / _NEW / name, folder / name)
    for name in plan["obsolete"]:
        if os.path.lexists(folder / name):
            _keep(folder, name)
            (folder / name).unlink(missing_ok=True)
            _remove_empty_parents(folder, name)
    _sync(folder)
    _drop_journal(folder)


def _back(folder: Path) -> None:
    """Undo what ``_forward`` did before it failed: new files out, earlier ones back."""
    journal = folder / JOURNAL
    waiting = set(names_in(journal / _NEW))
    for name in _read_plan(journal)["new"]:
        if name not in waiting and os.path.lexists(folder / name):
            os.replace(folder / name, journal / _NEW / name)
            _remove_empty_parents(folder, name)
    for name in names_in(journal / _EARLIER):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(journal / _EARLIER / name, folder / name)
    _drop_journal(folder)


def _read_plan(journal: Path) -> dict[str, list[str]]:
    """What is to be moved. The plan is a file in a user's folder: names that lead out of it are refused."""
    try:
        plan = json.loads((journal / _PLAN).read_text())
        names = {key: [str(name) for name in plan[key]] for key in ("new", "obsolete")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _odd_journal(journal, f"has no readable {_PLAN}") from error
    if any(path.is_symlink() for path in (journal, journal / _NEW, journal / _EARLIER)):
        raise _odd_journal(journal, "holds symbolic links")
    for name in (*names["new"], *names["obsolete"]):
        if not is_inside(name) or link_in(journal.parent, str(Path(name).parent)):
            raise _odd_journal(journal, f"names '{name}', which leads out of the folder")
    return names


def _odd_journal(journal: Path, fact: str) -> ArtifactError:
    return ArtifactError(f"load: {journal} is no record of an interrupted export: it {fact}. Remove it, then export again.")


def _keep(folder: Path, name: str) -> None:
    """A second name for what stands at ``name``, so that a failure can put it back."""
    here, kept = folder / name, folder / JOURNAL / _EARLIER / name
    if not os.path.lexists(here) or os.path.lexists(kept):
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(here, kept, follow_symlinks=False)
    except OSError:  # a file system without hard links
        os.replace(here, kept)


def _drop_journal(folder: Path) -> None:
    """Not removed in place: half a journal would be taken for a whole one."""
    done = folder / f"{STAGING}{os.getpid()}-{time.monotonic_ns()}"
    os.rename(folder / JOURNAL, done)
    shutil.rmtree(done, ignore_errors=True)


def _check_free(folder: Path, name: str) -> None:
    """Refuse to write over a folder, or through a link to somewhere else."""
    link = link_in(folder, str(Path(name).parent)) if "/" in name else None
    if link is not None:
        raise ArtifactError(f"step 4/4 write: {link} is a symbolic link, and '{name}' would be written through it. Remove it.")
    for path in (folder / name, *(folder / name).parents):
        if path == folder:
            return
        in_the_way = path.is_dir() and not path.is_symlink() if path == folder / name else path.exists() and not path.is_dir()
        if in_the_way:
            kind = "folder" if path.is_dir() else "file"
            raise ArtifactError(
                f"step 4/4 write: {path} is a {kind}, where '{name}' has to go. Move it, or choose another --output."
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


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against other exports; the kernel lets go when the process ends, however it ends.

    The lock is on the folder itself, so no file is left. A file system without locks is used without.

    Raises:
        BlockingIOError: another process holds it.
    """
    if fcntl is None:
        yield
        return
    while True:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:
                pass  # network file systems: the rename to JOURNAL still lets only one export through
            if not folder.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                folder.mkdir(parents=True, exist_ok=True)  # another export failed and took its folder away
                continue
            yield
            return
        finally:
            os.close(descriptor)


def _sync(path: Path) -> None:
    """To the disk, before a rename that says it is there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _DISK:
            raise  # others: a file system that cannot sync folders
    finally:
        os.close(descriptor)


def _disk_error(error: BaseException | None) -> OSError | None:
    """The full or failing disk behind an error that a library wrapped."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in _DISK:
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # innermost first
        with contextlib.suppress(OSError):
            folder.rmdir()


def _remove_empty_parents(folder: Path, name: str) -> None:
    _remove_empty([path for path in (folder / name).parents if path != folder and folder in path.parents])
