"""``sam3x bench-pipeline``: an exported pipeline against its source's eager code, in turn, each in a process of its own."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sam3x.bench.process import ContenderError, Worker, workers_closed
from sam3x.bench.report import Machine
from sam3x.bench.run import machine_of
from sam3x.errors import ArtifactError, Sam3xError, Step
from sam3x.runtime.manifest import ComponentSpec, load_manifest

KINDS = {"pipeline": "pipeline", "eager": "pipeline-eager"}
CLICK_KINDS = {"pipeline": "click", "eager": "click-eager"}


class PipelineMetrics(BaseModel):
    """One contender. Seconds are wall time; memory is resident megabytes of its process.

    Attributes:
        start_seconds: from the start of the process to open files (``pipeline``: every sha256 compared) or a loaded model.
        first_seconds: from there to the first result; a component's file is opened when it is first needed.
        seconds: of each timed run, picture and prompt in, masks out. cpu_seconds: of all its threads, which other work on the
            machine changes less. detections: how many it found.
        run_mb: highest memory of the runs, above what was loaded before the first; None where the system does not tell.
    """

    model_config = ConfigDict(frozen=True)

    start_seconds: float
    first_seconds: float
    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...] = ()
    peak_mb: float
    run_mb: float | None = None
    detections: int

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


class ComponentMetrics(BaseModel):
    """What the export of one component took; ``off`` is its largest difference from eager over an output's largest value."""

    model_config = ConfigDict(frozen=True)

    seconds: float
    file_mb: float
    off: float | None


class PipelineReport(BaseModel):
    """What ``bench_pipeline`` measured; ratios are medians of the rounds' own, pipeline over eager, of time and of CPU time.

    Attributes:
        export: the manifest's figures. files_mb: of all files of the folder, external data too.
        picture: its path; None: noise. click: whether a click on the encoded picture was measured, in place of a search.
    """

    model_config = ConfigDict(frozen=True)

    folder: str
    origin: str
    export: dict[str, float]
    files_mb: float
    components: dict[str, ComponentMetrics]
    machine: Machine
    picture: str | None
    click: bool = False
    threads: int
    contenders: dict[str, PipelineMetrics]
    ratio: float | None = None
    cpu_ratio: float | None = None
    largest_score_gap: float | None = None


def bench_pipeline(
    folder: Path,
    *,
    checkpoint: Path | None = None,
    module: str | None = None,
    eager: bool = True,
    picture: Path | None = None,
    threshold: float | None = None,
    click: bool = False,
    threads: int = 2,
    repeat: int = 3,
    timeout: float = 900.0,
    tell: Callable[[str], None] = lambda _: None,
) -> PipelineReport:
    """Segment one picture with one prompt, ``repeat`` times each way.

    Args:
        checkpoint, module: the pipeline's source. eager: whether to run it at all.
        picture: None: 1008x1008 of noise. threshold: see ``Segmenter.segment``.
        click: measure a click on the middle of a picture whose features are there.

    Raises:
        Sam3xError: a contender failed, found something else, or the source has other weights than the pipeline.
    """
    manifest, machine = load_manifest(folder, check=False), machine_of()
    if click and manifest.clicks is None:
        raise ArtifactError(f"{folder} has no interactive head", remedy="Leave --click out.", step=Step.BENCH)
    if eager and checkpoint is None and module is None and not manifest.origin.startswith("random weights"):
        fact = f"{folder} was exported from {manifest.origin}"
        raise ArtifactError(fact, remedy="Name that source: --checkpoint or --module.", step=Step.BENCH)
    job: dict[str, Any] = {
        "path": str(folder.absolute()),
        "checkpoint": None if checkpoint is None else str(checkpoint.absolute()),
        "module": module,
        "picture": None if picture is None else str(picture.absolute()),
        "threshold": threshold,
        "threads": threads,
    }
    workers: dict[str, Worker] = {}
    starts: dict[str, tuple[float, float]] = {}
    seconds: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch, workers_closed(workers):
        kinds = CLICK_KINDS if click else KINDS
        outputs = {name: Path(scratch) / f"{name}.npy" for name in kinds}
        names = [name for name in kinds if eager or name == "pipeline"]
        try:
            for name in names:
                tell(f"{name}: start")
                made = Worker(
                    {**job, "kind": kinds[name], "output": str(outputs[name])}, {"OMP_NUM_THREADS": str(threads)}, timeout
                )
                workers[name] = made
                made.until("loaded")
                loaded = time.perf_counter()
                made.until("ready")  # the eager one refuses another source's weights itself
                starts[name] = (loaded - made.started, time.perf_counter() - loaded)
            for turn in range(repeat):
                for name in names:
                    tell(f"{name}: run {turn + 1} of {repeat}")
                    wall, used = workers[name].run()
                    seconds.setdefault(name, []).append(wall)
                    cpu.setdefault(name, []).append(used)
            memory = {name: workers[name].finish()["memory"] for name in names}
        except ContenderError as error:
            raise Sam3xError(str(error), subject=name, step=Step.BENCH) from error
        scores = {name: _scores(outputs[name]) for name in names}
    found = {
        name: PipelineMetrics(
            start_seconds=starts[name][0],
            first_seconds=starts[name][1],
            seconds=tuple(seconds[name]),
            cpu_seconds=tuple(cpu[name]),
            peak_mb=memory[name]["peak"],
            run_mb=memory[name]["peak_run"] - memory[name]["loaded"] if memory[name]["restarted"] else None,
            detections=len(scores[name]),
        )
        for name in names
    }
    ratio = cpu_ratio = gap = None
    if eager:
        ratio, cpu_ratio = _ratio(seconds), _ratio(cpu)
        if len(scores["pipeline"]) != len(scores["eager"]):
            raise Sam3xError(f"the pipeline found {len(scores['pipeline'])}, eager {len(scores['eager'])}", step=Step.BENCH)
        gap = float(abs(scores["pipeline"] - scores["eager"]).max()) if len(scores["eager"]) else 0.0
    return PipelineReport(
        folder=str(folder),
        origin=manifest.origin,
        export=manifest.metrics,
        files_mb=sum((folder / name).stat().st_size for name in manifest.files) / 1e6,
        components={item.name: _component(folder, item) for item in manifest.components},
        machine=machine,
        picture=job["picture"],
        click=click,
        threads=threads,
        contenders=found,
        ratio=ratio,
        cpu_ratio=cpu_ratio,
        largest_score_gap=gap,
    )


def _ratio(rounds: dict[str, list[float]]) -> float:
    return statistics.median(ours / theirs for ours, theirs in zip(rounds["pipeline"], rounds["eager"], strict=True))


def _component(folder: Path, spec: ComponentSpec) -> ComponentMetrics:
    data = folder / f"{spec.file}.data"
    size = (folder / spec.file).stat().st_size + (data.stat().st_size if data.exists() else 0)
    off = max((record.max_rel for record in spec.verification), default=None)
    return ComponentMetrics(seconds=spec.metrics.get("seconds", 0.0), file_mb=size / 1e6, off=off)


def _scores(path: Path) -> Any:
    import numpy as np

    return np.sort(np.load(path))
