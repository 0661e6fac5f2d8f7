"""``export_pipeline``: a whole image model into component files, each verified, with a manifest that connects them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3x.artifact.files import names_in, sha256_of
from sam3x.artifact.manifest import MANIFEST, sealed
from sam3x.artifact.memory import peak_memory
from sam3x.artifact.publish import publishing
from sam3x.capture.samples import clamped
from sam3x.errors import SpecError, TargetUnavailableError
from sam3x.fusion.layer_template import weights_of
from sam3x.pipeline.fuse import export_fused, fused
from sam3x.pipeline.job import ComponentJob
from sam3x.pipeline.quality import eager_answers, quality_of
from sam3x.pipeline.request import PARTS, check_pipeline
from sam3x.pipeline.tokenizer import write_tokenizer
from sam3x.runtime.manifest import SEGMENTER, ComponentSpec, PipelineManifest
from sam3x.sources.contract import COMPONENTS, Component, Cut, ImageModel, walk
from sam3x.sources.cut import MAX_PROMPTS
from sam3x.spec import ExportSpec
from sam3x.targets.base import resolve
from sam3x.targets.registry import get_target
from sam3x.verify.component import Case

Progress = Callable[[str], None]

DEFAULTS: dict[str, Any] = {"dac": False, "pre_norm": "module", "batch": (1, MAX_PROMPTS)}
"""The fusion encoder runs as in the source (``runtime`` keeps the branches in the file); batch counts prompts."""


def export_pipeline(
    cut: Cut,
    *,
    target: str = "onnx",
    output: str | Path,
    tokenizer: str | Path | None = None,
    components: Sequence[str] = COMPONENTS,
    fuse: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> PipelineManifest:
    """Export every component of an image model, run each against eager, and publish them together.

    Args:
        cut: what ``sam3x.sources.image`` returns.
        target: see ``sam3x targets``. output: folder; replaced as a whole once everything is verified.
        tokenizer: ``bpe_simple_vocab_16e6.txt.gz``, a ``tokenizer.json`` or a folder with one. None: the source's own, or none.
        components: those to export, all by default; docs/compatibility.md says which a target takes.
        fuse: join what runs for every prompt as one ``segmenter.onnx`` (docs/decisions/0016-fused-pipeline.md).
        progress: told each step as it begins.
        options: ``dac``, ``pre_norm``, ``branches``, ``verify``, ``seed`` of ``ExportSpec``, and the target's own options.

    Raises:
        Sam3xError: typed by step; nothing is left in ``output`` that was not there before.
    """
    tell = progress or (lambda _: None)
    started = time.perf_counter()
    back_end = get_target(target)
    spec, target_options = resolve(back_end, {**DEFAULTS, **back_end.default_options, **options})
    unknown = [name for name in components if name not in COMPONENTS]
    if unknown or not components:
        raise SpecError(f"no component {', '.join(unknown) or 'named'}; there are {', '.join(COMPONENTS)}")
    check_pipeline(target, options, None if tuple(components) == COMPONENTS else components, fuse=fuse)
    status = back_end.availability()
    if not status.available:
        raise TargetUnavailableError(
            f"target '{target}' cannot export here: {status.detail}", remedy=f"Install it: {status.install}"
        )
    with publishing(output) as publication:
        staging = publication.path
        tell("source")
        model = cut(spec)
        vocabulary = write_tokenizer(tokenizer or model.tokenizer, staging, model)
        tell("eager components")
        cases = cases_of(model, spec)
        job = ComponentJob(back_end, target_options, spec, staging, tell)
        # quality is of a whole pipeline that runs here; eager answers before its components go
        measured = job.below is not None and set(components) == set(COMPONENTS) and job.unverified is None
        answers = eager_answers(model, spec.seed) if measured else []
        waiting = sorted((item for item in model.components if item.name in components), key=_weight, reverse=True)
        joined = fused(model.components) if fuse else None
        joined_cases = [] if joined is None else joined.cases(cases)
        model = replace(model, components=())
        made: dict[str, ComponentSpec] = {}
        while waiting:  # the largest last, when the others' weights are gone; nothing but the list holds a component
            made[waiting[-1].name] = job.export(waiting[-1], cases.pop(waiting[-1].name))
            del waiting[-1]
            if joined is not None and made.keys() >= set(PARTS):
                segmenter = export_fused(job, joined, made, joined_cases)
                made = {SEGMENTER: segmenter, **{name: item for name, item in made.items() if name not in PARTS}}
                joined, joined_cases = None, []
            gc.collect()  # traced programs hold weights in cycles
        quality = None
        if measured:
            tell("mask IoU against fp32")
            whole = [made[name] for name in (*COMPONENTS, SEGMENTER) if name in made]
            quality = quality_of(answers, whole, lambda name: back_end.load_runner(staging / name), str(job.below))
        manifest = PipelineManifest(
            target=target,
            opset=back_end.opset,
            source=model.source,
            components=tuple(made[name] for name in (*COMPONENTS, SEGMENTER) if name in made),
            image_size=model.image_size,
            mean=model.mean,
            std=model.std,
            context_length=model.context_length,
            fixed_length=model.fixed_length,
            vocab_size=model.vocab_size,
            pad_id=model.pad_id,
            box_text=model.box_text,
            tokenizer=vocabulary,
            unescape_html=model.unescape_html,
            threshold=model.threshold,
            mask_interpolation=model.mask_interpolation,
            spec=spec.model_dump(mode="json"),
            target_options=target_options.model_dump(mode="json"),
            origin=model.origin,
            weights_sha256=model.weights_sha256,
            versions={"sam3x": version("sam3x"), **back_end.versions()},
            verified=job.unverified is None,
            verified_reason=job.unverified,
            quality=quality,
            files={name: sha256_of(staging / name) for name in names_in(staging)},
            figures={
                "total_seconds": round(time.perf_counter() - started, 3),
                "peak_rss_mb": round(peak_memory() / 2**20, 3),
            },
            notes=(*model.notes, *job.notes),
        )
        (staging / MANIFEST).write_text(sealed(manifest))
        publication.commit()
    return manifest


def _weight(component: Component) -> int:
    """Bytes of its parameters and buffers."""
    return sum(value.nbytes for value in weights_of(component.module).values())


def cases_of(model: ImageModel, spec: ExportSpec) -> dict[str, list[Case]]:
    """Component → inputs and eager outputs at several sizes: many prompts, one prompt, boxes that are padding."""
    sizes = [(3, min(5, model.context_length), 2, 4), (1, model.context_length, 1, 1)]
    if spec.verify == "full":
        sizes.append((4, max(2, model.context_length // 2), 5, 3))
    found: dict[str, list[Case]] = {component.name: [] for component in model.components}
    vision = None
    for index, (prompts, length, boxes, queries) in enumerate(sizes):
        prompts = clamped(prompts, spec.batch)
        length = model.context_length if model.fixed_length else length
        given = _given(model, prompts, length, boxes, spec.seed + index)
        trace = walk(model.components, given, lambda value, count=queries: value[:, :count], vision)  # type: ignore[misc]
        for name, (inputs, outputs) in trace.items():
            if name != "vision_encoder" or vision is None:
                found[name].append((f"{prompts} prompts, length {length}, {boxes} boxes, {queries} queries", inputs, outputs))
        vision = trace["vision_encoder"]
    return found


def _given(model: ImageModel, prompts: int, length: int, boxes: int, seed: int) -> Mapping[str, Tensor]:
    """Seeded outer inputs: noise for a picture, texts of several lengths, prompts with all, some and no boxes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.vocab_size, (prompts, length), generator=generator)
    box_mask = torch.zeros((prompts, boxes), dtype=torch.bool)
    for row in range(prompts):
        ids[row, max(2, length - row * 2) :] = model.pad_id
        box_mask[row, max(0, boxes - row) :] = True
    if prompts == 1:
        box_mask[:] = True
    corner = torch.rand((prompts, boxes, 2), generator=generator) * 0.5 + 0.25
    extent = torch.rand((prompts, boxes, 2), generator=generator) * 0.4 + 0.05
    return {
        "image": torch.randn((1, 3, model.image_size, model.image_size), generator=generator),
        "input_ids": ids,
        "attention_mask": torch.arange(length)[None] < (length - 2 * torch.arange(prompts)[:, None]).clamp(min=2),
        "boxes": torch.cat([corner, extent], dim=-1),
        "box_labels": torch.randint(0, 2, (prompts, boxes), generator=generator),
        "box_mask": box_mask,
    }
