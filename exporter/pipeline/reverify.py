"""``sam3x verify`` of a pipeline: every component against the eager source again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from sam3x.artifact.manifest import VerificationRecord
from sam3x.artifact.publish import replace_manifest
from sam3x.errors import Step
from sam3x.pipeline.export import cases_of
from sam3x.pipeline.fuse import fused
from sam3x.pipeline.quality import eager_answers, quality_of
from sam3x.precision.component import reduced, rounded
from sam3x.runtime.manifest import SEGMENTER, load_manifest
from sam3x.sources.contract import COMPONENTS, Cut, Expected
from sam3x.spec import ExportSpec
from sam3x.targets.base import Runner, Target, arithmetic_precision, weight_precision
from sam3x.targets.registry import get_target
from sam3x.verify.compare import require
from sam3x.verify.component import verify_component


def verify_pipeline(folder: str | Path, cut: Cut, *, full: bool = False) -> list[VerificationRecord]:
    """Run every component file on what the eager components make of seeded inputs.

    A pipeline that could not be verified where it was exported is from then on, and its manifest says so.

    Args:
        cut: the source it was exported from. full: at one more size.

    Raises:
        ArtifactError: the source's weights are not those of the pipeline.
        VerificationError: an output is further off than allowed.
    """
    manifest = load_manifest(folder)
    spec = ExportSpec(**manifest.spec)
    spec = spec.model_copy(update={"verify": "full"}) if full else spec
    model = cut(spec, Expected(folder=str(folder), origin=manifest.origin, weights_sha256=manifest.weights_sha256))
    cases, target = cases_of(model, spec), get_target(manifest.target)
    options = target.options_type(**manifest.target_options)
    precision = weight_precision(target, options)
    exported = {item.name: item for item in manifest.components}
    components = list(model.components)
    if manifest.fused:
        whole = fused(components)
        components.append(whole)
        cases[SEGMENTER] = whole.cases(cases)
    found: dict[str, tuple[VerificationRecord, ...]] = {}
    for component in (item for item in components if item.name in exported):
        path = Path(folder) / exported[component.name].file
        given = cases[component.name]
        with rounded(component, precision, given) as expected:
            before = None if precision is None else [outputs for _, _, outputs in given]
            rounding = reduced(component, target, options)
            found[component.name] = verify_component(component, partial(target.load_runner, path), expected, before, rounding)
        require(found[component.name], Step.REVERIFY, f"{manifest.target} {component.name}")
    if not manifest.verified:
        complete = tuple(item.model_copy(update={"verification": found[item.name]}) for item in manifest.components)
        known: dict[str, Any] = {"components": complete, "verified": True, "verified_reason": None}
        below = precision or arithmetic_precision(target, options)
        if below is not None and (manifest.fused or set(exported) == set(COMPONENTS)):
            answers = eager_answers(model, spec.seed)
            load = partial(_runner, target, Path(folder))
            known["quality"] = quality_of(answers, manifest.components, load, below)
        replace_manifest(Path(folder), manifest.model_copy(update=known))
    return [record for records in found.values() for record in records]


def _runner(target: Target, folder: Path, file: str) -> Runner:
    return target.load_runner(folder / file)
