"""One question to many pictures: asked by this process, or by several, each with a ``Segmenter`` of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sam3x.errors import ArtifactError, SpecError, Step
from sam3x.runtime.segmenter import Segmenter
from sam3x.targets.registry import get_target

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

    from sam3x.runtime.manifest import PipelineManifest
    from sam3x.runtime.result import Masks

_AHEAD = 4  # pictures a process that may be answered before the one whose turn it is


@dataclass(frozen=True, kw_only=True)
class Picture:
    """``name`` as it is told; ``stem`` of the files that are written for it, no two the same; ``source`` for ``Segmenter``."""

    name: str
    stem: str
    source: Path | bytes


@dataclass(frozen=True, kw_only=True)
class Question:
    """A call of ``Segmenter`` without its picture; ``best``: of a click's answers, as many of each object, the best ones."""

    how: Literal["segment", "click", "everything"]
    arguments: Mapping[str, Any]
    best: int | None = None

    def ask(self, segmenter: Segmenter, picture: Any) -> Masks:
        """What ``segmenter`` finds; raises what its method raises."""
        found = getattr(segmenter, self.how)(picture, **self.arguments)
        return found if self.best is None else found.top(self.best)


@dataclass(frozen=True, kw_only=True)
class Drawings:
    """Files that are written for each picture, by the process that answered it.

    Attributes:
        drawn: the folder for pictures with masks over them, or the file where there is one picture. masks: the folder of masks.
    """

    drawn: Path | None = None
    masks: Path | None = None
    several: bool = False

    def write(self, picture: Picture, result: Masks) -> None:
        """Write each file, whole or not at all; raises ``ArtifactError`` where one cannot be written."""
        if self.drawn is not None:
            result.draw(self._drawing(self.drawn, picture))
        if self.masks is not None:
            result.write_masks(self.masks, picture.stem)

    def stand(self, picture: Picture, count: int) -> bool:
        """Whether all files of a picture with ``count`` detections are on disk."""
        masks = [] if self.masks is None else [self.masks / f"{picture.stem}_{index}.png" for index in range(count)]
        return all(path.exists() for path in [*([self._drawing(self.drawn, picture)] if self.drawn else []), *masks])

    def _drawing(self, drawn: Path, picture: Picture) -> Path:
        return drawn / f"{picture.stem}.png" if self.several else drawn


def resume_key(manifest: PipelineManifest, question: Question, drawings: Drawings, picture: Picture) -> str | None:
    """What an answer depends on, as 16 hex digits: pipeline, question, files, and the picture's name, size and time.

    None where the picture is no file on disk.
    """
    if not isinstance(picture.source, Path):
        return None
    try:
        status = picture.source.stat()
    except OSError:
        return None
    folders = [None if path is None else str(path.absolute()) for path in (drawings.drawn, drawings.masks)]
    asked = [question.how, question.arguments, question.best, *folders, picture.name, picture.stem]
    values = [version("sam3x"), manifest.manifest_sha256, *asked, status.st_size, status.st_mtime_ns]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


Answer = dict[str, Any] | SpecError
"""``Masks.to_dict``, or why there is none."""


def answers(
    segmenter: Segmenter, question: Question, pictures: Iterable[Picture], drawings: Drawings, *, processes: int = 1
) -> Generator[tuple[Picture, Answer]]:
    """Ask about every picture, in their order; a picture that cannot be answered stops no other.

    Args:
        processes: with more than one, each opens the pipeline anew, with its share of the cores as threads where ``segmenter``
            was given none. They end with this process, however that ends.

    Raises:
        ArtifactError: a file cannot be run or written, or a process died.
    """
    if processes == 1:
        for picture in pictures:
            yield picture, _answer(segmenter, question, picture, drawings)
        return
    arguments = {**segmenter.arguments, "check": False, "threads": _threads(segmenter, processes)}
    with _workers(processes, (segmenter.folder, arguments, question, drawings)) as workers:
        yield from _in_order(workers, pictures)


def _answer(segmenter: Segmenter, question: Question, picture: Picture, drawings: Drawings) -> Answer:
    try:
        result = question.ask(segmenter, picture.source)
    except SpecError as error:
        return error
    drawings.write(picture, result)
    return result.to_dict()


def _threads(segmenter: Segmenter, processes: int) -> int | None:
    """The threads of one of ``processes``; None where the pipeline's target has no such setting."""
    given: Any = segmenter.arguments["threads"]
    if given is not None:
        return given
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        get_target(segmenter.manifest.target).session_settings(threads=1)
    except SpecError:
        return None
    return max(1, cores // processes)


@contextlib.contextmanager
def _workers(count: int, task: tuple[Any, ...]) -> Iterator[list[Connection]]:
    """Connections to as many processes; they read the end of a connection as their own, so none outlives this process."""
    context = multiprocessing.get_context("spawn")
    started: list[tuple[Connection, SpawnProcess]] = []
    try:
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, *task), daemon=True)
            process.start()
            there.close()
            started.append((here, process))
        yield [connection for connection, _ in started]
    except BaseException:
        for _, process in started:
            process.terminate()
        raise
    finally:
        for connection, process in started:
            connection.close()
            process.join()


def _work(connection: Connection, folder: Path, arguments: dict[str, Any], question: Question, drawings: Drawings) -> None:
    """Answer the pictures that come, until nobody is there to ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process that started this one, and that ends it
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            with Segmenter(folder, **arguments) as segmenter:
                while True:
                    connection.send(_answer(segmenter, question, connection.recv(), drawings))
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            connection.send(_Failed(error))


class _Failed:
    """What ended a process; an exception that cannot be pickled goes as its words."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        if type(self.error).__module__ == "sam3x.errors":
            return _Failed, (self.error,)
        return _Failed, (RuntimeError(f"{type(self.error).__name__}: {self.error}"),)


def _in_order(workers: list[Connection], pictures: Iterable[Picture]) -> Iterator[tuple[Picture, Answer]]:
    """Answers in the order of the pictures; a few that are ahead wait, whatever the number of pictures."""
    left, idle = enumerate(pictures), list(workers)
    busy: dict[Connection, tuple[int, Picture]] = {}
    done: dict[int, tuple[Picture, Answer]] = {}
    turn = given = 0
    while True:
        while idle and given < turn + _AHEAD * len(workers):
            following = next(left, None)
            if following is None:
                break
            connection, given = idle.pop(), given + 1
            busy[connection] = following
            with _dying(following[1]):
                connection.send(following[1])
        if not busy:
            return
        ready: list[Any] = wait([*busy])
        for connection in ready:
            index, picture = busy.pop(connection)
            with _dying(picture):
                answer = connection.recv()
            if isinstance(answer, _Failed):
                raise answer.error
            done[index] = picture, answer
            idle.append(connection)
        while turn in done:
            yield done.pop(turn)
            turn += 1


@contextlib.contextmanager
def _dying(picture: Picture) -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise ArtifactError(
            f"a process that was given {picture.name} died",
            remedy="If memory ran out, take fewer --processes. With --json FILE the same command goes on where this one ended.",
            step=Step.RUN,
        ) from error
