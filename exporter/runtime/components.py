"""The component files of a pipeline, connected as its manifest says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3x.errors import ArtifactError, Sam3xError, Step
from sam3x.runtime.manifest import ComponentSpec, PipelineManifest
from sam3x.targets.registry import get_target

if TYPE_CHECKING:
    from sam3x.targets.base import Runner


class Components:
    """Runs one component at a time on the pipeline's named tensors; a file is opened when it is first needed.

    Args:
        threads, providers: see ``Segmenter``.

    Raises:
        SpecError: a setting that the pipeline's target does not have, or a value that it does not take.
        TargetUnavailableError: a provider is missing, with the package that brings it.
    """

    def __init__(self, folder: Path, manifest: PipelineManifest, *, threads: Any = None, providers: Any = None) -> None:
        self.folder, self.manifest = folder, manifest
        self._target = get_target(manifest.target)
        self._settings = self._target.session_settings(threads=threads, providers=providers)
        self._runners: dict[str, Runner] | None = {}

    def run(self, name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of component ``name``, under the names of pipeline tensors.

        Raises:
            ArtifactError: the file cannot be opened or run, or ``close`` was called.
        """
        spec, runner = self.manifest.component(name), self.open(name)
        with _failing(spec, "run", Step.RUN):
            return run_component(spec, runner, tensors)

    def open(self, name: str) -> Runner:
        """The runner of component ``name``, its file opened if it is not yet; raises ``ArtifactError`` as ``run``."""
        spec = self.manifest.component(name)
        if self._runners is None:
            raise ArtifactError(
                "the Segmenter is closed", remedy=f"Open another: Segmenter({str(self.folder)!r})", step=Step.RUN
            )
        if name not in self._runners:
            with _failing(spec, "opened", Step.LOAD):
                self._runners[name] = self._target.load_runner(self.folder / spec.file, **self._settings)
        return self._runners[name]

    def close(self) -> None:
        """Let go of every file and its memory."""
        self._runners = None


@contextlib.contextmanager
def _failing(spec: ComponentSpec, what: str, step: Step) -> Iterator[None]:
    """Every runtime has exceptions of its own; what comes out is an ``ArtifactError`` that names the file."""
    try:
        yield
    except Sam3xError:
        raise
    except Exception as error:
        fact = str(error).strip().partition("\n")[0].rstrip(".")
        raise ArtifactError(f"{spec.file} cannot be {what} ({type(error).__name__}: {fact})", step=step) from error


def run_component(spec: ComponentSpec, runner: Runner, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a component under the names of pipeline tensors.

    Where the file takes a fixed number of prompts, or at least some, the last one is repeated, and nothing is given for that.
    """
    arrays = fed(spec, tensors)
    per_prompt = [item.name for item in spec.inputs if item.shape[:1] == ("prompts",)]
    least = spec.ranges.get("prompts", (1, 1))[0]
    given = min((len(arrays[name]) for name in per_prompt), default=least)
    if given >= least:
        return {spec.writes[key]: value for key, value in runner.run(arrays).items()}
    for name in per_prompt:
        arrays[name] = np.concatenate([arrays[name], np.repeat(arrays[name][-1:], least - given, axis=0)])
    outputs = {spec.writes[key]: value for key, value in runner.run(arrays).items()}
    found = outputs.get("found_prompts")  # of a joined file: a row a detection, not a prompt
    return {name: value[:given] if found is None else value[found < given] for name, value in outputs.items()}


def fed(spec: ComponentSpec, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A component's inputs; a picture's tensor is repeated for every prompt where the component wants it so."""
    arrays = {name: np.asarray(value) for name, value in spec.constants.items()}
    own = {item.name: tensors[spec.reads[item.name]] for item in spec.inputs if item.name not in arrays}
    per_prompt = [item.name for item in spec.inputs if item.shape[:1] == ("prompts",)]
    prompts = max((len(own[name]) for name in per_prompt), default=1)
    for name, value in own.items():
        if name in per_prompt and len(value) != prompts:
            value = np.repeat(value, prompts, axis=0)
        arrays[name] = np.ascontiguousarray(value)
    return arrays
