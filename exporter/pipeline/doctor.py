"""``sam3x doctor`` of a whole model: every component by itself, on what the eager components before it give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sam3x.artifact.artifact import load_any
from sam3x.capture.component import capture_component
from sam3x.fusion.ambient import settled
from sam3x.pipeline.job import Progress
from sam3x.pipeline.request import Request, resolve_pipeline
from sam3x.pipeline.samples import samples_of
from sam3x.precision.doctor import DTYPES, Probe, allowed_error, examine, rewritten
from sam3x.precision.doctor_report import AttentionForm, PipelineDoctorReport, Precision
from sam3x.sources.contract import Expected, ImageModel, SourceFactory


@settled()
def doctor_pipeline(
    source: SourceFactory,
    *,
    folder: str | Path | None = None,
    components: Sequence[str] | None = None,
    precision: Precision = "fp16",
    bound: float | None = None,
    attention: AttentionForm = "layer",
    image_size: int | None = None,
    progress: Progress | None = None,
) -> PipelineDoctorReport:
    """Rank the operations of each component that a lower precision ruins, and name the fewest to keep in float32.

    Args:
        source: makes the model. folder: an export of it, whose request and weights are then those that are examined; with
            convolutions in int8, if it was exported with ``--calibrate``.
        components: those to examine; None: all that there are.
        bound: largest error against eager float32, of the largest value of each output (of a fusion encoder absolute); None:
            ``BOUNDS``.
        attention: how attention is computed in the low precision, as ``--attention`` of the TensorRT target.
        image_size: side of the pictures that it is examined with; None: as exported, or the model's own. Smaller ones are
            quicker, and errors of an operation hardly depend on it.
        progress: told each step as it begins.

    Raises:
        ArtifactError: the source's weights are not those of ``folder``.
        SpecError: no such component. SourceError: the model cannot take pictures of that size.
        VerificationError: float32 itself is beyond the bound.
    """
    tell, allowed = progress or (lambda _: None), allowed_error(precision, bound, attention)
    request, expected, calibrated = _request(folder, components)
    size = request.spec.image_size if image_size is None else image_size
    spec = request.spec.model_copy(update={"branches": "select", "verify": "off", "image_size": size})
    request = replace(request, spec=spec)
    tell("source")
    model = source(spec, expected)
    if isinstance(model, ImageModel):
        model = model.narrowed(request.components)
    samples = samples_of(model, request, tell)
    reports = []
    for component in (item for item in model.components if item.name in request.components):
        tell(f"{component.name}: capture")
        program = rewritten(capture_component(component, samples[component.name][0]))
        tell(f"{component.name}: emulate {precision}")
        probe = Probe(program, samples[component.name][:1], DTYPES[precision], attention, convolutions=calibrated)

        def say(step: str, name: str = component.name) -> None:
            tell(f"{name}: {step}")

        reports.append(
            examine(probe, precision=precision, bound=allowed, origin=model.origin, tell=say, component=component.name)
        )
    return PipelineDoctorReport(components=tuple(reports))


def _request(folder: str | Path | None, components: Sequence[str] | None) -> tuple[Request, Expected | None, bool]:
    """The request of the export in ``folder``, in float32, or of none; its weights; whether it was exported with pictures."""
    if folder is None:
        return resolve_pipeline("onnx", {}, components=components), None, False
    manifest = load_any(folder)
    made = Request.of(manifest)
    chosen = made.components if components is None else tuple(components)
    whole = resolve_pipeline("onnx", {}, components=chosen)
    expected = Expected(folder=str(folder), origin=manifest.origin, weights_sha256=manifest.weights_sha256)
    return replace(whole, spec=made.spec), expected, made.calibrated
