"""``sam3x verify``: every component of an export against the eager source again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sam3x.artifact.artifact import load_any
from sam3x.artifact.manifest import VerificationRecord
from sam3x.artifact.publish import replace_manifest
from sam3x.fusion.ambient import settled
from sam3x.pipeline.export import measured
from sam3x.pipeline.fuse import fused
from sam3x.pipeline.job import ComponentJob, Progress
from sam3x.pipeline.quality import eager_answers, quality_of
from sam3x.pipeline.request import Request
from sam3x.pipeline.samples import samples_of
from sam3x.precision.component import rounded
from sam3x.sources.contract import Expected, ImageModel, SourceFactory


@settled()
def verify_model(
    folder: str | Path, source: SourceFactory, *, full: bool = False, progress: Progress | None = None
) -> list[VerificationRecord]:
    """Run every file of an export on what eager makes of seeded inputs.

    One that could not be verified where it was exported is from then on, and its manifest says so.

    Args:
        source: makes the model it was exported from. full: at more and larger sizes. progress: told each step as it begins.

    Raises:
        ArtifactError: the source's weights are not those of the export.
        VerificationError: an output is further off than allowed.
    """
    manifest = load_any(folder)
    request = Request.of(manifest, full=full)
    job = ComponentJob(request, Path(folder), progress or (lambda _: None))
    expected = Expected(folder=str(folder), origin=manifest.origin, weights_sha256=manifest.weights_sha256)
    model = source(request.spec, expected)
    if isinstance(model, ImageModel):
        model = model.narrowed(request.components)
    samples, components = samples_of(model, request), list(model.components)
    if request.fuse:
        whole = fused(components)
        components.append(whole)
        samples[whole.name] = whole.samples(samples, request.numerics)
    found: dict[str, tuple[VerificationRecord, ...]] = {}
    files = {item.name: Path(folder) / item.file for item in manifest.components}
    for component in (item for item in components if item.name in files):
        with rounded(component, request.numerics, samples[component.name]) as given:
            found[component.name] = job.verified(component, files[component.name], given, "Export again.")
    if not manifest.verified:
        complete = tuple(item.model_copy(update={"verification": found[item.name]}) for item in manifest.components)
        known: dict[str, Any] = {"components": complete, "verified": True, "verified_reason": None}
        if measured(model, request):
            below = str(request.numerics.below)
            known["quality"] = quality_of(eager_answers(model, request.spec.seed), complete, job.open, below)
        replace_manifest(Path(folder), manifest.model_copy(update=known))
    return [record for records in found.values() for record in records]
