"""The component files of a pipeline, connected as its manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sam3x.runtime.manifest import ComponentSpec, PipelineManifest
from sam3x.targets.registry import get_target

if TYPE_CHECKING:
    from sam3x.targets.base import Runner


class Components:
    """Runs one component at a time on the pipeline's named tensors; a file is opened when it is first needed."""

    def __init__(self, folder: Path, manifest: PipelineManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._runners: dict[str, Runner] = {}

    def run(self, name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of component ``name``, under the names of pipeline tensors."""
        spec = self.manifest.component(name)
        if name not in self._runners:
            self._runners[name] = get_target(self.manifest.target).load_runner(self.folder / spec.file)
        return run_component(spec, self._runners[name], tensors)


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
