"""The way of every export: a request and a source in, component files with their manifest out, each verified."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

from sam3x.artifact.files import names_in, sha256_of
from sam3x.artifact.manifest import MANIFEST, SEGMENTER, ComponentSpec, Manifest, PipelineManifest, Quality, sealed
from sam3x.artifact.memory import peak_memory
from sam3x.artifact.publish import publishing
from sam3x.capture.program import Sample
from sam3x.fusion.ambient import settled
from sam3x.fusion.layer_template import weights_of
from sam3x.pipeline.calibration import Inputs, calibration_inputs
from sam3x.pipeline.fuse import FusedComponent, export_fused, fused
from sam3x.pipeline.job import ComponentJob, Progress
from sam3x.pipeline.quality import Answer, eager_answers, quality_of
from sam3x.pipeline.request import PARTS, Request, check_available, resolve_pipeline
from sam3x.pipeline.samples import samples_of
from sam3x.pipeline.serving import write_model
from sam3x.pipeline.tokenizer import write_tokenizer
from sam3x.sources.contract import Component, ImageModel, Model, SourceFactory
from sam3x.sources.names import COMPONENTS, DETECTOR


def export_pipeline(
    source: SourceFactory,
    *,
    target: str = "onnx",
    output: str | Path,
    tokenizer: str | Path | None = None,
    components: Sequence[str] | None = None,
    fuse: bool = False,
    progress: Progress | None = None,
    disable_pass: Sequence[str] = (),
    dump_graphs: str | Path | None = None,
    **options: Any,
) -> PipelineManifest:
    """Export every component of an image model, run each against eager, and publish them together.

    Args:
        source: what ``sam3x.sources.image`` returns.
        target: see ``sam3x targets``. output: folder; replaced as a whole once everything is verified.
        tokenizer: ``bpe_simple_vocab_16e6.txt.gz``, a ``tokenizer.json`` or a folder with one. None: the source's own, or none.
        components: those to export; None: all that the source has.
        fuse: join what runs for every prompt as one ``segmenter.onnx`` (docs/decisions/0016-fused-pipeline.md).
        progress: told each step as it begins.
        disable_pass: passes to leave out. dump_graphs: folder for each component's graph after each pass.
        options: ``dac``, ``pre_norm``, ``batch``, ``branches``, ``verify``, ``seed`` of ``ExportSpec``, and the target's own.

    Raises:
        Sam3xError: typed by step; nothing is left in ``output`` that was not there before.
    """
    passes = {"disable_pass": disable_pass, "dump_graphs": dump_graphs}
    request = resolve_pipeline(target, options, components=components, fuse=fuse, **passes)
    return export_model(request, source, output, tokenizer=tokenizer, progress=progress)  # type: ignore[return-value]


@settled()
def export_model(
    request: Request,
    source: SourceFactory,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Export the components of a model one after another, and publish them together.

    Args:
        tokenizer, progress: see ``export_pipeline``.

    Raises:
        Sam3xError: typed by step; nothing is left in ``output`` that was not there before.
    """
    tell, started = progress or (lambda _: None), time.perf_counter()
    check_available(request.target)
    ComponentJob(request, Path(output), tell)  # refuses passes that there are not
    names = [name for name in request.components if not request.fuse or name not in PARTS]
    with publishing(output, [MANIFEST, *map(request.file, [*names, *([SEGMENTER] if request.fuse else [])])]) as publication:
        staging = publication.path
        tell("source")
        model = source(request.spec)
        request = replace(request, spec=model.spec or request.spec)
        runtime: dict[str, Any] = {}
        if isinstance(model, ImageModel):
            model = model.narrowed(request.components)
            runtime = {**model.runtime(), "tokenizer": write_tokenizer(tokenizer or model.tokenizer, staging, model)}
        work = _Work.of(model, request, tell)
        model = replace(model, components=())
        job = ComponentJob(request, staging, tell)
        made, quality = work.done(job)
        job.refuse_idle()
        manifest = (PipelineManifest if runtime else Manifest)(
            target=request.target.name,
            opset=request.target.opset,
            components=made,
            spec=request.spec.model_dump(mode="json"),
            target_options=request.options.model_dump(mode="json"),
            origin=model.origin,
            weights_sha256=model.weights_sha256,
            versions={"sam3x": version("sam3x"), **request.target.versions()},
            verified=request.unverified is None,
            verified_reason=request.unverified,
            files={},
            metrics={
                **({name: value for name, value in made[0].metrics.items() if name != "seconds"} if len(made) == 1 else {}),
                "total_seconds": round(time.perf_counter() - started, 3),
                "peak_rss_mb": round(peak_memory() / 2**20, 3),
            },
            notes=(*model.notes, *_notes(made)),
            **({**runtime, "quality": quality} if runtime else {}),
        )
        if isinstance(manifest, PipelineManifest) and getattr(request.options, "layout", "flat") == "triton":
            write_model(staging, manifest)
        manifest = manifest.model_copy(update={"files": {name: sha256_of(staging / name) for name in names_in(staging)}})
        (staging / MANIFEST).write_text(sealed(manifest))
        publication.commit()
    return manifest


@dataclass(kw_only=True)
class _Work:
    """What is still to be exported. Nothing else holds the components, so that each is gone before the next, larger one.

    Attributes:
        waiting: components, the largest first. samples, calibration: of each.
        answers: what eager gives for whole prompts; empty where masks are not to be compared.
        joined, joined_samples: the component that ``PARTS`` become.
    """

    waiting: list[Component]
    samples: dict[str, list[Sample]]
    calibration: dict[str, list[Inputs]]
    answers: list[Answer]
    joined: FusedComponent | None
    joined_samples: list[Sample]

    @classmethod
    def of(cls, model: Model, request: Request, tell: Progress) -> _Work:
        samples = samples_of(model, request, tell)
        joined = fused(model.components) if request.fuse else None
        chosen = [item for item in model.components if item.name in request.components]
        return cls(
            waiting=sorted(chosen, key=_weight, reverse=True),
            samples=samples,
            calibration=calibration_inputs(model, request),
            answers=eager_answers(model, request.spec.seed) if measured(model, request) else [],
            joined=joined,
            joined_samples=[] if joined is None else joined.samples(samples, request.numerics),
        )

    def done(self, job: ComponentJob) -> tuple[tuple[ComponentSpec, ...], Quality | None]:
        """Export everything; components in the order in which they run, and what a lower precision does to masks."""
        made: dict[str, ComponentSpec] = {}
        while self.waiting:
            name = self.waiting[-1].name
            made[name] = job.export(self.waiting[-1], self.samples.pop(name), self.calibration.pop(name))
            del self.waiting[-1]
            if self.joined is not None and made.keys() >= set(PARTS):
                segmenter = export_fused(job, self.joined, made, self.joined_samples)
                made = {SEGMENTER: segmenter, **{name: item for name, item in made.items() if name not in PARTS}}
                self.joined, self.joined_samples = None, []
            gc.collect()  # traced programs hold weights in cycles
        whole = tuple(made[name] for name in (*COMPONENTS, SEGMENTER) if name in made)
        if not self.answers:
            return whole, None
        job.tell("mask IoU against fp32")
        return whole, quality_of(self.answers, whole, job.open, str(job.request.numerics.below))


def measured(model: Model, request: Request) -> TypeGuard[ImageModel]:
    """Return whether masks are compared with fp32's: of a whole detector, in a precision below fp32, that runs here."""
    made = {item.name for item in model.components if item.name in request.components}
    whole = isinstance(model, ImageModel) and made >= set(DETECTOR)
    return whole and request.numerics.below is not None and request.unverified is None


def _notes(made: Sequence[ComponentSpec]) -> list[str]:
    """What the components' files should be known by, under their names where it is not known of all."""
    found: dict[str, list[str]] = {}
    for item in made:
        for note in item.notes:
            found.setdefault(note, []).append(item.name)
    return [note if len(names) == len(made) else f"{', '.join(names)}: {note}" for note, names in found.items()]


def _weight(component: Component) -> int:
    """Bytes of its parameters and buffers."""
    return sum(value.nbytes for value in weights_of(component.module).values())
