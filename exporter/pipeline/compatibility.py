"""Which component each target takes: every one is really exported, small and with random weights, and what happened is told."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3x.errors import Sam3xError
from sam3x.pipeline.job import ComponentJob
from sam3x.pipeline.request import resolve_pipeline
from sam3x.pipeline.samples import samples_of
from sam3x.sources.image import random_image_source
from sam3x.sources.image_config import ImageModelConfig
from sam3x.sources.names import COMPONENTS
from sam3x.targets.registry import get_target

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

TARGETS: Mapping[str, Mapping[str, Any]] = {"onnx": {}, "pte": {}, "trt": {"compute_capability": "sm89"}}
"""Target → options that an export without a GPU needs."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One component for one target: whether a file was written, and how near it is to eager or why there is none."""

    written: bool
    text: str


def compatibility(
    targets: Mapping[str, Mapping[str, Any]] = TARGETS, tell: Callable[[str], None] = lambda _: None
) -> dict[str, dict[str, Cell]]:
    """Target → component → cell."""
    return {name: _row(name, options, tell) for name, options in targets.items()}


def _row(name: str, options: Mapping[str, Any], tell: Callable[[str], None]) -> dict[str, Cell]:
    target = get_target(name)
    status = target.availability()
    if not status.available:
        return dict.fromkeys(COMPONENTS, Cell(False, f"{status.detail}; {status.install}"))
    request = resolve_pipeline(target, options)
    model = random_image_source(WITH_CLICKS)(request.spec)
    samples, found = samples_of(model, request), {}
    for component in model.components:
        with tempfile.TemporaryDirectory() as folder:
            job = ComponentJob(request, Path(folder), lambda step: tell(f"{name}: {step}"))
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
        "Made by `sam3x compatibility -o docs/compatibility.md`: each component of a small SAM3 of random weights is written",
        "to each target (`sam3x export --pipeline --target T --components C`). Distances are of an output's largest value.",
        "",
        f"With {', '.join(f'{name} {value}' for name, value in versions.items())}.",
        "",
        "| component | " + " | ".join(found) + " |",
        "|---" * (len(found) + 1) + "|",
    ]
    notes: list[str] = []
    for component in COMPONENTS:
        cells = []
        for name, row in found.items():
            cell = row[component]
            notes += [] if cell.written else [f"- `{component}` to {name}: {cell.text}"]
            cells.append(cell.text.replace("|", "\\|") if cell.written else "no, see below")
        lines.append(f"| `{component}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(["", "## Why not", "", *notes] if notes else []), ""])
