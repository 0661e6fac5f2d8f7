"""The file of ``sam3x run --json``: a line of JSON a picture, and what a run that was ended left of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sam3x.artifact.lock import lock_file
from sam3x.errors import ArtifactError, Step
from sam3x.runtime.output import told, written


class AnswerLines:
    """Lines gather in ``FILE.part`` and become ``FILE``, in the order of the pictures, when all are there.

    A later run takes from both what was answered under the same key. A context manager: an error, or a kill, leaves ``FILE`` as
    it was.

    Args:
        path: ``FILE``. What is no regular file, a pipe or a device, gets each line at once.
        keys: of each picture by name, in order; None where an earlier answer is not taken.

    Raises:
        ArtifactError: it cannot be written, or another run is writing it.
    """

    def __init__(self, path: Path, keys: Mapping[str, str | None]) -> None:
        self.path, self._keys = path, keys
        self._part = path.with_name(f"{path.name}.part")
        self._places: dict[str, tuple[Path, int]] = {}
        self._through = path.exists() and not path.is_file()
        with told(path):
            self._file: BinaryIO = path.open("wb") if self._through else self._part.open("a+b")
        if self._through:
            return
        try:
            lock_file(self._file.fileno())
            self._read()
        except BlockingIOError as error:
            self._file.close()
            fact, remedy = f"another run is writing {path}", "Wait for it, or name another file."
            raise ArtifactError(fact, remedy=remedy, step=Step.RUN) from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> AnswerLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None and not self._through:
                written(self.path, self._write)
        if not self._through and (kind is None or not self._places):
            self._part.unlink(missing_ok=True)

    def found(self, name: str) -> dict[str, Any] | None:
        """The line of a picture that was answered; None of another."""
        if name not in self._places:
            return None
        return json.loads(self._line(name))

    def add(self, name: str, found: Mapping[str, Any]) -> None:
        """Write a picture's line; raises ``ArtifactError`` where it cannot be written."""
        key = self._keys.get(name)
        line = json.dumps({"picture": name, **found, **({} if key is None else {"resume_key": key})})
        with told(self.path):
            place = 0 if self._through else self._file.seek(0, os.SEEK_END)
            self._file.write(f"{line}\n".encode())
            self._file.flush()
        self._places[name] = self._part, place

    def _read(self) -> None:
        """Note where the lines stand whose key is as it should be; the last one may be cut off."""
        with told(self.path):
            for path in (self.path, self._part):
                if not path.is_file():
                    continue
                with path.open("rb") as file:
                    for place, line in _lines(file):
                        name = _name(line, self._keys)
                        if name is not None:
                            self._places[name] = path, place
            if self._file.seek(0, os.SEEK_END) and not _ends(self._file):
                self._file.write(b"\n")

    def _line(self, name: str) -> bytes:
        path, place = self._places[name]
        with path.open("rb") as file:
            file.seek(place)
            return file.readline()

    def _write(self, path: Path) -> None:
        with path.open("wb") as whole:
            for name in self._keys:
                if name in self._places:
                    whole.write(self._line(name))


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    place = 0
    for line in file:
        yield place, line
        place += len(line)


def _ends(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"


def _name(line: bytes, keys: Mapping[str, str | None]) -> str | None:
    """The picture of a whole line that was written under the key it has now."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("picture"), str):
        return None
    key = keys.get(found["picture"])
    return found["picture"] if key is not None and key == found.get("resume_key") else None
