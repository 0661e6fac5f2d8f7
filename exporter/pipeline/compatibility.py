"""What each target takes: the fusion encoder and every component are really exported, small and with random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3x.errors import Sam3xError
from sam3x.fusion.config import FusionConfig
from sam3x.pipeline.job import ComponentJob
from sam3x.pipeline.request import Request, resolve, resolve_pipeline
from sam3x.pipeline.samples import samples_of
from sam3x.sources.contract import Model
from sam3x.sources.encoder import build_encoder, draw_weights, encoder_factory
from sam3x.sources.image import random_image_source
from sam3x.sources.image_config import ImageModelConfig
from sam3x.sources.names import COMPONENTS
from sam3x.targets.registry import built_in_names, get_target

SMALL = ImageModelConfig(
    image_size=112,
    embed_dim=32,
    depth=2,
    vit_heads=2,
    mlp_ratio=2.0,
    window_size=4,
    global_att_blocks=(1,),
    pretrain_img_size=56,
    text_width=32,
    text_heads=2,
    text_layers=2,
    context_length=16,
    vocab_size=530,
    d_model=32,
    num_heads=4,
    dim_feedforward=64,
    encoder_layers=2,
    decoder_layers=2,
    geometry_layers=1,
    num_queries=12,
)
"""Meta's architecture with every kind of layer once or twice."""

WITH_CLICKS = SMALL.model_copy(update={"interactive": True})
"""The same with its interactive head."""

TARGETS: Mapping[str, Mapping[str, Any]] = {**{name: {} for name in built_in_names()}, "trt": {"compute_capability": "sm89"}}
"""Target → options that an export without a GPU needs."""

ALONE = "fusion encoder, every branch"
"""By itself, with dac and pre-norm as inputs."""

ROWS = (ALONE, *(f"`{name}`" for name in COMPONENTS))
"""Of the page."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One row for one target: whether a file was written, and how near it is to eager or why there is none."""

    written: bool
    text: str


def compatibility(
    targets: Mapping[str, Mapping[str, Any]] = TARGETS, tell: Callable[[str], None] = lambda _: None
) -> dict[str, dict[str, Cell]]:
    """Target → row → cell."""
    return {name: _row(name, options, tell) for name, options in targets.items()}


def _row(name: str, options: Mapping[str, Any], tell: Callable[[str], None]) -> dict[str, Cell]:
    target = get_target(name)
    status = target.availability()
    if not status.available:
        return dict.fromkeys(ROWS, Cell(False, f"{status.detail}; {status.install}"))
    alone, whole = resolve(target, {"tokens": 36, **options}), resolve_pipeline(target, options)
    (encoder,) = _cells(alone, encoder_factory(_encoder())(alone.spec), tell).values()
    components = _cells(whole, random_image_source(WITH_CLICKS)(whole.spec), tell)
    return {ALONE: encoder, **{f"`{name}`": cell for name, cell in components.items()}}


def _encoder() -> Any:
    encoder = build_encoder(FusionConfig(d_model=32, num_heads=4, dim_feedforward=64, num_layers=2)).eval()
    draw_weights(encoder, seed=3)
    return encoder


def _cells(request: Request, model: Model, tell: Callable[[str], None]) -> dict[str, Cell]:
    samples, found = samples_of(model, request), {}
    for component in model.components:
        with tempfile.TemporaryDirectory() as folder:
            job = ComponentJob(request, Path(folder), lambda step: tell(f"{request.target.name}: {step}"))
            try:
                made = job.export(component, samples[component.name])
            except Sam3xError as error:
                found[component.name] = Cell(False, f"{error.subject}: {error.fact}" if error.subject else error.fact)
                continue
        worst = max((record.max_rel for record in made.verification), default=None)
        text = f"built, not run: {request.unverified}" if worst is None else f"verified, {worst:.0e} from eager"
        found[component.name] = Cell(True, text)
    return found


def markdown(found: Mapping[str, Mapping[str, Cell]], versions: Mapping[str, str]) -> str:
    """The page ``docs/compatibility.md``."""
    lines = [
        "# Components and targets",
        "",
        "Made by `sam3x compatibility -o docs/compatibility.md`: a small fusion encoder by itself, dac and pre-norm as inputs",
        "(`sam3x export --target T`), and each component of a small SAM3 (`--pipeline --components C`),",
        "of random weights, are written to each target. Distances are of an output's largest value.",
        "",
        f"With {', '.join(f'{name} {value}' for name, value in versions.items())}.",
        "",
        "| | " + " | ".join(found) + " |",
        "|---" * (len(found) + 1) + "|",
    ]
    notes: list[str] = []
    for row in ROWS:
        cells = []
        for name, column in found.items():
            cell = column[row]
            notes += [] if cell.written else [f"- {row} to {name}: {cell.text}"]
            cells.append(cell.text.replace("|", "\\|") if cell.written else "no, see below")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(["", "## Why not", "", *notes] if notes else []), ""])
