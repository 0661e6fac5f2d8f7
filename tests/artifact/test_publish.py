"""An export arrives whole or not at all: killed at every step, on a full disk, beside another export, among a user's files."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sam3x.artifact.artifact import load
from sam3x.artifact.journal import JOURNAL, STAGING
from sam3x.artifact.publish import publishing
from sam3x.errors import ArtifactError
from support.folders import contents, write_export

GRAPH = "fusion_encoder.onnx"
OLD = {GRAPH: b"old graph", "fusion_encoder.onnx.data": b"old weights", "0/old.plan": b"old plan"}
NEW = {GRAPH: b"new graph", "1/model.plan": b"new plan", "1/2/config": b"new config"}
MINE = {"mine.txt": b"kept", "notes/mine.txt": b"kept too", "0/mine.txt": b"beside a file of the export"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An earlier export among files of the user's."""
    out = tmp_path / "out"
    write_export(out, OLD)
    for name, data in MINE.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(data)
    return out


def publish(folder: Path, files: dict[str, bytes] = NEW, prepared: Path | None = None) -> None:
    with publishing(folder) as publication:
        if prepared is None:
            write_export(publication.path, files)
        else:
            prepared.rename(publication.path)
        publication.commit()


def without_manifest(folder: Path) -> dict[str, Any]:
    return {name: data for name, data in contents(folder).items() if name != "manifest.json"}


def test_the_new_export_takes_the_place_of_the_old_one_and_of_nothing_else(folder: Path) -> None:
    publish(folder)
    assert without_manifest(folder) == {**NEW, **MINE}
    assert set(load(folder).manifest.files) == set(NEW)
    assert [item.name for item in folder.parent.iterdir()] == ["out"]


def test_files_changed_since_the_earlier_export_are_the_users(folder: Path) -> None:
    (folder / "0/old.plan").write_bytes(b"edited")
    publish(folder)
    assert without_manifest(folder) == {**NEW, **MINE, "0/old.plan": b"edited"}


def test_folders_of_the_earlier_export_go_when_they_are_empty(tmp_path: Path) -> None:
    publish(tmp_path / "out", OLD)
    publish(tmp_path / "out", NEW)
    assert not (tmp_path / "out" / "0").exists()


# ---- killed


def killed_at(step: int, folder: Path) -> bool:
    """Publish in a process that kills itself, with signal 9, before its ``step``-th file operation; whether it lived on."""
    child = os.fork()
    if not child:
        operations = 0

        def count(event: str, _: Any) -> None:
            nonlocal operations
            if event in ("open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir"):
                operations += 1
                if operations == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            publish(folder)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_killed_before_any_file_operation_the_folder_is_the_old_export_or_the_new_one(tmp_path: Path) -> None:
    seen = []
    for step in range(1, 1000):
        out = tmp_path / str(step) / "out"
        write_export(out, OLD)
        for name, data in MINE.items():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_bytes(data)
        finished = killed_at(step, out)
        names = set(load(out).manifest.files)
        files = {name: data for name, data in without_manifest(out).items() if not name.startswith(STAGING)}
        assert names in (set(OLD), set(NEW))
        assert files == {**(OLD if names == set(OLD) else NEW), **MINE}, f"killed at file operation {step}"
        assert not (out / JOURNAL).exists()
        if step % 7 == 0 or finished:
            publish(out, OLD)  # and what was left is cleared away
            assert without_manifest(out) == {**OLD, **MINE}
            assert not list(out.glob(f"{STAGING}*"))
        seen.append(names == set(NEW))
        if finished:
            break
    assert finished and step > 60
    assert seen == sorted(seen), "once committed, always the new one"
    assert seen.count(True) > 20 and seen.count(False) > 20


def test_killed_while_it_is_repaired(folder: Path) -> None:
    """Every step of the repair may be the last one, too."""
    for step in range(1, 1000):
        if not killed_at(step, folder) and (folder / JOURNAL).exists():
            break
    for step in range(1, 100):
        if killed_at(step, folder):
            break
    assert without_manifest(folder) == {**NEW, **MINE}


def test_a_first_export_that_is_killed_leaves_nothing_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    killed_at(12, out)
    with pytest.raises(ArtifactError, match=r"manifest\.json cannot be read"):
        load(out)
    publish(out)
    assert without_manifest(out) == NEW


def test_an_interrupted_export_is_finished_by_load_alone(folder: Path) -> None:
    step = next(step for step in range(1, 1000) if not killed_at(step, folder) and (folder / JOURNAL).exists())
    assert set(load(folder).manifest.files) == set(NEW), step
    assert {n: d for n, d in without_manifest(folder).items() if not n.startswith(STAGING)} == {**NEW, **MINE}


# ---- errors


class Stop(Exception):
    pass


def test_an_error_leaves_everything_as_it_was(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    for out in (folder, tmp_path / "new" / "deep"):
        with pytest.raises(Stop), publishing(out) as publication:
            write_export(publication.path, NEW)
            raise Stop
    assert contents(folder) == before
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("function", ["replace", "link", "unlink", "rename", "mkdir"])
def test_a_file_operation_that_fails_puts_the_earlier_export_back(
    function: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call in turn fails once: what was there is there again, or the export finds another way."""
    before = contents(folder)
    original, calls, failing, prepared = getattr(os, function), 0, 0, folder

    def fail_once(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += not str(args[0]).startswith(str(prepared))
        if calls == failing:
            raise OSError(errno.EACCES, "Permission denied")
        return original(*args, **named)

    while calls >= failing:
        prepared = folder.parent / f"prepared{failing}"
        write_export(prepared, NEW)
        calls, failing = 0, failing + 1
        try:
            with monkeypatch.context() as patch:
                patch.setattr(os, function, fail_once)
                publish(folder, prepared=prepared)
        except ArtifactError as error:
            assert "cannot be written (Permission denied)" in str(error)
            assert contents(folder) == before
        else:
            assert {n: d for n, d in without_manifest(folder).items() if not n.startswith(STAGING)} == {**NEW, **MINE}
            publish(folder, OLD)
    assert failing > 2


def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 200 kB."""
    yield from small_disk(tmp_path / "disk", 200)


def test_a_full_disk(disk: Path) -> None:
    out = disk / "out"
    write_export(out, {GRAPH: b"x" * 90_000})
    (out / "mine.txt").write_bytes(b"kept")
    before = contents(disk)
    with pytest.raises(ArtifactError, match=r"cannot be written \(No space left on device\).*as it was.*Free space"):
        publish(out, {GRAPH: b"y" * 150_000})
    assert contents(disk) == before
    publish(out, {GRAPH: b"y" * 60_000})  # the disk is whole again
    assert load(out).path.read_bytes() == b"y" * 60_000
    assert (out / "mine.txt").read_bytes() == b"kept"


def test_a_disk_that_is_full_behind_another_error(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(ArtifactError, match=r"File too large"), publishing(folder):
        try:
            raise OSError(errno.EFBIG, "File too large")
        except OSError as error:
            raise RuntimeError("writer failed") from error
    assert contents(folder) == before


# ---- two at once


def test_a_second_export_into_the_same_folder_is_refused_and_the_first_unharmed(folder: Path, tmp_path: Path) -> None:
    alias = tmp_path / "alias"
    alias.symlink_to(folder)
    with publishing(folder) as publication:
        for again in (folder, alias):
            with pytest.raises(ArtifactError, match="another export is writing into"), publishing(again):
                raise AssertionError("let in")
        write_export(publication.path, NEW)
        publication.commit()
    assert without_manifest(folder) == {**NEW, **MINE}
    publish(folder, OLD)  # and afterwards it is free


def test_loading_while_another_thread_exports(folder: Path) -> None:
    """Each load gives one export or the other, never a mixture and never an error."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        while not stop.is_set():
            try:
                assert set(load(folder).manifest.files) in (set(OLD), set(NEW))
            except BaseException as error:
                failures.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(20):
        publish(folder, (NEW, OLD)[turn % 2])
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures


# ---- what may be in the way


def test_a_link_to_a_folder_is_followed_and_kept(folder: Path, tmp_path: Path) -> None:
    alias = tmp_path / "alias"
    alias.symlink_to(folder)
    publish(alias)
    assert alias.is_symlink() and without_manifest(folder) == {**NEW, **MINE}


def test_a_link_to_nothing_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for name, fact in (("dangling", "it is a link to nothing"), ("file", "it is a file"), ("file/deep", "Not a directory")):
        with pytest.raises(ArtifactError, match=f"cannot be written .{fact}"):
            publish(tmp_path / name)
    assert contents(tmp_path) == before


def test_a_linked_file_is_replaced_and_its_target_untouched(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"mine")
    (folder / GRAPH).unlink()
    (folder / GRAPH).symlink_to(tmp_path / "elsewhere")
    publish(folder)
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"
    assert not (folder / GRAPH).is_symlink() and load(folder).path.read_bytes() == b"new graph"


def test_nothing_is_written_through_a_linked_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "1").symlink_to(tmp_path / "elsewhere")
    before = contents(folder)
    with pytest.raises(ArtifactError, match=r"out/1 is a symbolic link"):
        publish(folder)
    assert contents(folder) == before and not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(("name", "kind"), [("1/model.plan", "folder"), ("1/2", "file")])
def test_a_folder_or_file_of_the_users_in_the_way(name: str, kind: str, folder: Path) -> None:
    (folder / "1").mkdir()
    if kind == "folder":
        (folder / name).mkdir()
        (folder / name / "mine").write_text("kept")
    else:
        (folder / name).write_text("kept")
    before = contents(folder)
    with pytest.raises(ArtifactError, match=rf"{name} is a {kind}, where"):
        publish(folder)
    assert contents(folder) == before


# ---- a journal somebody made


@pytest.mark.parametrize(
    "plan",
    [
        '{"new": ["../stolen"], "obsolete": []}',
        '{"new": [], "obsolete": ["../victim"]}',
        '{"new": [], "obsolete": ["/etc/hostname"]}',
        '{"new": [], "obsolete": ["way/victim"]}',
        "[]",
        "{",
    ],
)
def test_a_journal_that_leads_out_of_the_folder_is_refused(plan: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("kept")
    (folder / "way").symlink_to(tmp_path)
    (folder / JOURNAL / "new").mkdir(parents=True)
    (folder / JOURNAL / "plan.json").write_text(plan)
    before = contents(tmp_path)
    for attempt in (load, publish):
        with pytest.raises(ArtifactError, match=r"no record of an interrupted export"):
            attempt(folder)
    assert contents(tmp_path) == before


def test_a_journal_with_links_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / GRAPH).write_text("kept")
    (folder / JOURNAL).mkdir()
    (folder / JOURNAL / "new").symlink_to(tmp_path / "elsewhere")
    (folder / JOURNAL / "plan.json").write_text(f'{{"new": ["{GRAPH}"], "obsolete": []}}')
    with pytest.raises(ArtifactError, match="symbolic links"):
        load(folder)
    assert (tmp_path / "elsewhere" / GRAPH).read_text() == "kept"


# ---- names


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "./x", "", "a//b", "a\\b", ".", "..", "a/", "x\0y"])
def test_names_that_are_no_plain_relative_names(name: str) -> None:
    from sam3x.artifact.files import is_inside

    assert not is_inside(name)


@pytest.mark.parametrize("name", ["x", "1/model.plan", "a/b/c", "..x", "x..y/z"])
def test_plain_relative_names(name: str) -> None:
    from sam3x.artifact.files import is_inside

    assert is_inside(name)
