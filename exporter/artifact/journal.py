"""The journal of an export on its way into its folder: everything new in it, and how to move it, from wherever it stopped.

Layout of ``JOURNAL``: ``new/`` the files still to be moved, ``earlier/`` a second name of each file that was replaced,
``plan.json`` the names of both.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path

from sam3x.artifact.files import is_inside, link_in, names_in
from sam3x.artifact.lock import locked
from sam3x.artifact.manifest import MANIFEST
from sam3x.errors import ArtifactError

JOURNAL = ".sam3x-commit"
STAGING = ".sam3x-staging-"
NEW, EARLIER, PLAN = "new", "earlier", "plan.json"
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_WAIT = 10.0  # seconds; moving the files takes milliseconds


def commit(root: Path, folder: Path, obsolete: list[str]) -> None:
    """Make ``root`` (inside ``folder``, with the new files in ``NEW``) the journal, and carry it out.

    Raises:
        OSError: a file cannot be moved; all is as it was.
    """
    names = names_in(root / NEW)
    (root / EARLIER).mkdir()
    (root / PLAN).write_text(json.dumps({"new": names, "obsolete": obsolete}))
    for name in names:
        sync(root / NEW / name)
    sync(root / PLAN)
    for parent in {(root / NEW / name).parent for name in names} | {root}:
        sync(parent)
    os.rename(root, folder / JOURNAL)  # from here on the new export is the one that counts
    try:
        sync(folder)
        _forward(folder)
    except OSError:
        _back(folder)
        raise


def recover(folder: Path) -> None:
    """Finish what a killed export had committed.

    Raises:
        ArtifactError: the files cannot be moved (a folder that may only be read).
    """
    deadline = time.monotonic() + _WAIT
    while os.path.lexists(folder / JOURNAL):
        try:
            with locked(folder):
                finish(folder)
        except BlockingIOError as error:  # another process is moving the files, or an export has begun that does so first
            if time.monotonic() >= deadline:
                raise ArtifactError(
                    f"another process has been writing into {folder} for {_WAIT:.0f} s", remedy="Try again."
                ) from error
            time.sleep(0.02)
        except OSError as error:
            raise ArtifactError(
                (
                    f"an export into {folder} was interrupted after it was complete, and its files cannot be moved into "
                    f"place ({error.strerror})"
                ),
                remedy=f"Load it once where {folder} can be written.",
            ) from error


def finish(folder: Path) -> None:
    """``recover`` for who holds the lock."""
    if (folder / JOURNAL).is_dir():
        _forward(folder)


def _forward(folder: Path) -> None:
    """Move every new file into place, the manifest last; may be repeated from wherever it stopped."""
    journal = folder / JOURNAL
    plan = _read_plan(journal)
    waiting = set(names_in(journal / NEW))
    for name in sorted(plan["new"], key=lambda item: item == MANIFEST):
        if name in waiting:
            _keep(folder, name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(journal / NEW / name, folder / name)
    for name in plan["obsolete"]:
        if os.path.lexists(folder / name):
            _keep(folder, name)
            (folder / name).unlink(missing_ok=True)
            _remove_empty_parents(folder, name)
    sync(folder)
    _drop_journal(folder)


def _back(folder: Path) -> None:
    """Undo what ``_forward`` did before it failed: new files out, earlier ones back."""
    journal = folder / JOURNAL
    waiting = set(names_in(journal / NEW))
    for name in _read_plan(journal)["new"]:
        if name not in waiting and os.path.lexists(folder / name):
            os.replace(folder / name, journal / NEW / name)
            _remove_empty_parents(folder, name)
    for name in names_in(journal / EARLIER):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(journal / EARLIER / name, folder / name)
    _drop_journal(folder)


def _read_plan(journal: Path) -> dict[str, list[str]]:
    """What is to be moved. The plan is a file in a user's folder: names that lead out of it are refused."""
    try:
        plan = json.loads((journal / PLAN).read_text())
        names = {key: [str(name) for name in plan[key]] for key in ("new", "obsolete")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _odd_journal(journal, f"has no readable {PLAN}") from error
    if any(path.is_symlink() for path in (journal, journal / NEW, journal / EARLIER)):
        raise _odd_journal(journal, "holds symbolic links")
    for name in (*names["new"], *names["obsolete"]):
        if not is_inside(name) or link_in(journal.parent, str(Path(name).parent)):
            raise _odd_journal(journal, f"names '{name}', which leads out of the folder")
    return names


def _odd_journal(journal: Path, fact: str) -> ArtifactError:
    return ArtifactError(f"{journal} is no record of an interrupted export: it {fact}", remedy="Remove it, then export again.")


def _keep(folder: Path, name: str) -> None:
    """A second name for what stands at ``name``, so that a failure can put it back."""
    here, kept = folder / name, folder / JOURNAL / EARLIER / name
    if not os.path.lexists(here) or os.path.lexists(kept):
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(here, kept, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without hard links, or Windows, which follows links
        os.replace(here, kept)


def _drop_journal(folder: Path) -> None:
    """Not removed in place: half a journal would be taken for a whole one."""
    done = folder / f"{STAGING}{os.getpid()}-{time.monotonic_ns()}"
    os.rename(folder / JOURNAL, done)
    shutil.rmtree(done, ignore_errors=True)


def _remove_empty_parents(folder: Path, name: str) -> None:
    for parent in (folder / name).parents:  # innermost first
        if parent == folder or next(parent.iterdir(), None) is not None:
            return
        parent.rmdir()


def sync(path: Path) -> None:
    """To the disk, before a rename that says it is there."""
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes what may be written alone
    except PermissionError:
        if path.is_dir():  # Windows opens no folder
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise  # others: a file system that cannot sync folders
    finally:
        os.close(descriptor)
