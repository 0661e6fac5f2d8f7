"""What a benchmark is asked for, what it found, and the arithmetic between the two. Needs pydantic alone."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sam3x.errors import SpecError, Step, did_you_mean

SCHEMA_VERSION = 1
BASELINES = {
    "eager": "Meta's layers in torch eager, float32",
    "inductor": "the same under torch.compile",
    "onnx-default": "torch.onnx.export of the same at that one size, run in ONNX Runtime",
    "openvino": "the file of onnx-default, run in OpenVINO",
}
"""Names of ``--baseline`` and what each one is."""

DEFAULT_BRANCH = {"dac": False, "pre_norm": True}
"""The branch SAM3's own encoder takes."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BenchRequest(_Record):
    """One benchmark, as asked for; made by ``make_request``.

    Attributes:
        folders: exported folders, as the user wrote them. baselines: names of ``BASELINES``.
        tokens: token counts, each a table of its own. branches: ``{"dac": bool, "pre_norm": bool}``, likewise.
        reference: name of the contender that ratios are against; None: the first baseline that runs, else the first folder.
        threads: of every contender. repeat: timed rounds. warmup: rounds before them that are not counted.
        checkpoint, module: the encoder of the baselines; neither is the default with random weights.
        seed: of those weights and of the inputs. timeout: seconds that one step of one contender may take.
        profile: also the time by operator, of artifacts whose runtime tells it, in runs of their own after the timed ones.
    """

    folders: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    tokens: tuple[int, ...] = (5184,)
    batch: int = 1
    prompt_length: int = 32
    branches: tuple[dict[str, bool], ...] = (DEFAULT_BRANCH,)
    reference: str | None = None
    threads: int = 2
    repeat: int = 5
    warmup: int = 1
    checkpoint: str | None = None
    module: str | None = None
    seed: int = 0
    timeout: float = 900.0
    profile: bool = False


class ProfileRow(_Record):
    """One operator of a contender's graph: calls and milliseconds of one run, and its share of all operators."""

    operator: str
    calls: int
    milliseconds: float
    share: float


class Timing(_Record):
    """Wall seconds of the timed rounds. ``cpu`` is the median of user and system seconds of the whole process."""

    median: float
    low: float
    high: float
    cpu: float
    rounds: tuple[float, ...]


class Ratio(_Record):
    """Median, lowest and highest of the quotients with the reference, round by round: what slows both is in both.

    ``fastest`` is the quotient of the two fastest rounds: other work on the machine only ever makes a round slower.
    """

    median: float
    low: float
    high: float
    fastest: float


class Memory(_Record):
    """Resident megabytes (10⁶ bytes) of the contender's process.

    imported: once its libraries are imported. loaded: once it is ready to run. peak_load: highest until then.
    peak_first: highest from then to the end of the first run. peak_run: to the end of the last. Where the system cannot
    start the count again (``restarted`` is False) both are of the whole life. peak: highest of all.
    """

    imported: float
    loaded: float
    peak_load: float
    peak_first: float
    peak_run: float
    peak: float
    restarted: bool

    @property
    def above_imported(self) -> float:
        """What the encoder costs: its weights and everything it needs to run."""
        return self.peak - self.imported

    @property
    def above_loaded(self) -> float:
        """What a run costs on top of the loaded encoder."""
        return max(0.0, self.peak_run - self.loaded)


class Result(_Record):
    """One contender in one case. ``error`` says why what is missing is missing.

    Attributes:
        kind: ``artifact`` or the baseline's name. options: how an artifact was exported (branches, attention, …).
        ratio: None for the reference itself too. peak_ratio: its peak memory over the reference's.
        cold_start: seconds from the start of the process to the first output.
        export_seconds: an artifact's capture, passes and lowering as its manifest has them, verification apart; for
            ``onnx-default`` the seconds of ``torch.onnx.export`` in this run.
        file_bytes: graph and weights on disk. nodes: of the graph alone; inner_nodes: of the sub-graphs of its branches.
        weight_bytes: of the weights in the file, or of the module's parameters.
        profile: time by operator, slowest first; empty where it was not asked for or the runtime tells none.
        from_reference: largest difference of the first output from the reference's, None where weights or shapes differ.
    """

    name: str
    kind: str
    options: dict[str, str] = {}
    timing: Timing | None = None
    ratio: Ratio | None = None
    peak_ratio: float | None = None
    memory: Memory | None = None
    cold_start: float | None = None
    export_seconds: float | None = None
    file_bytes: int | None = None
    weight_bytes: int | None = None
    nodes: int | None = None
    inner_nodes: int | None = None
    weights_sha256: str | None = None
    from_reference: float | None = None
    profile: tuple[ProfileRow, ...] = ()
    error: str | None = None


class Case(_Record):
    """One size and branch. ``reference`` is the contender the ratios are against; None when nothing ran."""

    tokens: int
    batch: int
    prompt_length: int
    branch: dict[str, bool]
    reference: str | None
    results: tuple[Result, ...]

    def result(self, name: str) -> Result | None:
        """The contender of that name."""
        return next((item for item in self.results if item.name == name), None)


class Machine(_Record):
    """Where it ran. ``load_before`` is the load average of the last minute before the first contender started."""

    cpu: str
    cores: int
    memory_mb: float | None
    system: str
    python: str
    versions: dict[str, str]
    load_before: float | None


class BenchReport(_Record):
    """Everything ``sam3x bench --json`` prints; tables and pages are made from it."""

    schema_version: int = SCHEMA_VERSION
    command: str
    started: str
    seconds: float
    request: BenchRequest
    machine: Machine
    cases: tuple[Case, ...]

    @property
    def failures(self) -> list[tuple[Case, Result]]:
        """Contenders that did not finish."""
        return [(case, result) for case in self.cases for result in case.results if result.error]


# ---- the request


def make_request(
    *,
    folders: Sequence[str | Path] = (),
    baselines: Sequence[str] = (),
    tokens: str | Iterable[int] = (5184,),
    branches: Sequence[str] = (),
    **others: Any,
) -> BenchRequest:
    """Check everything that can be checked before a process is started.

    Raises:
        SpecError: the option, what was given, and what it takes.
    """
    for name in baselines:
        if name not in BASELINES:
            raise SpecError(
                f"no baseline '{name}'; there are {', '.join(BASELINES)}",
                subject="--baseline",
                remedy=did_you_mean(name, BASELINES),
                step=Step.BENCH,
            )
    if not folders and not baselines:
        raise SpecError("nothing to run", remedy="Name an exported folder, or a --baseline.", step=Step.BENCH)
    request = BenchRequest(
        folders=tuple(dict.fromkeys(str(folder) for folder in folders)),
        baselines=tuple(dict.fromkeys(baselines)),
        tokens=_counts(tokens),
        branches=tuple(parse_branch(text) for text in dict.fromkeys(branches)) or (DEFAULT_BRANCH,),
        **{name: value for name, value in others.items() if value is not None},
    )
    for name, low in (("batch", 1), ("prompt_length", 1), ("threads", 1), ("repeat", 1), ("warmup", 0)):
        if getattr(request, name) < low:
            raise SpecError(
                f"at least {low}, got {getattr(request, name)}", subject=f"--{name.replace('_', '-')}", step=Step.BENCH
            )
    if not request.timeout > 0:
        raise SpecError(f"more than 0 seconds, got {request.timeout:g}", subject="--timeout", step=Step.BENCH)
    if request.checkpoint is not None and request.module is not None:
        raise SpecError(
            "--checkpoint and --module both name the encoder of the baselines", remedy="Give one of them.", step=Step.BENCH
        )
    names = contender_names(request)
    if request.reference is not None and request.reference not in names:
        raise SpecError(
            f"no contender '{request.reference}'; there are {', '.join(names)}", subject="--reference", step=Step.BENCH
        )
    if request.baselines and request.batch % 2 and any(branch["dac"] and branch["pre_norm"] for branch in request.branches):
        raise SpecError(
            f"--branch dac=on halves the batch, and --batch is {request.batch}", remedy="Give an even --batch.", step=Step.BENCH
        )
    return request


def _counts(tokens: str | Iterable[int]) -> tuple[int, ...]:
    parts = tokens.split(",") if isinstance(tokens, str) else [str(item) for item in tokens]
    if not all(part.strip().isascii() and part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise SpecError(f"expected counts as in 256,1024,5184, got '{','.join(parts)}'", subject="--tokens", step=Step.BENCH)
    return tuple(dict.fromkeys(int(part) for part in parts))


def parse_branch(text: str) -> dict[str, bool]:
    """``dac=on,pre_norm=off`` → flags; one that is not named keeps the default.

    Raises:
        SpecError: another flag, or another value than on and off.
    """
    branch = dict(DEFAULT_BRANCH)
    for part in text.split(","):
        name, _, value = (piece.strip().lower() for piece in part.partition("="))
        if name.replace("-", "_") not in branch or value not in ("on", "off"):
            raise SpecError(f"expected flags as in dac=off,pre_norm=on, got '{text}'", subject="--branch", step=Step.BENCH)
        branch[name.replace("-", "_")] = value == "on"
    return branch


def branch_text(branch: Mapping[str, bool]) -> str:
    """``dac=off,pre_norm=on``."""
    return ",".join(f"{name}={'on' if value else 'off'}" for name, value in branch.items())


def command_of(request: BenchRequest, *, files: Mapping[str, str | Path | None] | None = None) -> str:
    """The command line that asks for this, without what is the default anyway."""
    words = ["sam3x", "bench", *request.folders]
    for name in request.baselines:
        words += ["--baseline", name]
    default = BenchRequest()
    if request.tokens != default.tokens:
        words += ["--tokens", ",".join(map(str, request.tokens))]
    if request.branches != default.branches:
        for branch in request.branches:
            words += ["--branch", branch_text(branch)]
    others = ("batch", "prompt_length", "reference", "threads", "repeat", "warmup", "checkpoint", "module", "seed", "timeout")
    for name in others:
        if getattr(request, name) != getattr(default, name):
            words += [f"--{name.replace('_', '-')}", f"{getattr(request, name)}"]
    words += ["--profile"] if request.profile else []
    for option, path in (files or {}).items():
        words += [option, str(path)] if path is not None else []
    return shlex.join(words)


def contender_names(request: BenchRequest) -> dict[str, str]:
    """Name of each contender → the folder, or the baseline itself. Folders first, by their last part where that is enough."""
    short = {folder: Path(folder).name or Path(folder).resolve().name for folder in request.folders}
    taken = [*short.values(), *request.baselines]
    names = {short[folder] if taken.count(short[folder]) == 1 else folder: folder for folder in request.folders}
    return {**names, **{name: name for name in request.baselines}}


# ---- the arithmetic


def timing_of(seconds: Sequence[float], cpu_seconds: Sequence[float]) -> Timing:
    """Median, lowest and highest of the timed rounds."""
    return Timing(
        median=statistics.median(seconds),
        low=min(seconds),
        high=max(seconds),
        cpu=statistics.median(cpu_seconds),
        rounds=tuple(seconds),
    )


def ratio_of(seconds: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Quotients of the same round, then their median: a round in which the machine was slow was slow for both."""
    quotients = [mine / other for mine, other in zip(seconds, reference, strict=True)]
    return Ratio(
        median=statistics.median(quotients), low=min(quotients), high=max(quotients), fastest=min(seconds) / min(reference)
    )


def with_ratios(results: Sequence[Result], order: Sequence[str]) -> tuple[str | None, tuple[Result, ...]]:
    """Results with their ratios, and the reference: the first of ``order`` that ran, else the first contender that did."""
    ran = {item.name: item for item in results if item.timing is not None and item.error is None}
    name = next((name for name in [*order, *ran] if name in ran), None)
    return name, tuple(_against(item, ran[name]) if name and item.name in ran else item for item in results)


def _against(item: Result, reference: Result) -> Result:
    if item.name == reference.name or item.timing is None or reference.timing is None:
        return item
    peak = item.memory.peak / reference.memory.peak if item.memory and reference.memory else None
    return item.model_copy(update={"ratio": ratio_of(item.timing.rounds, reference.timing.rounds), "peak_ratio": peak})
