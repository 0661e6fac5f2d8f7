"""``sam3x doctor``: which operations a lower precision ruins, and the fewest to keep in float32."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from sam3x.cli.console import reporting, shown_steps, suppressed_output
from sam3x.cli.options import Checkpoint, Demo, Json, Module, Quiet, Verbose, WeightsKey, check_page
from sam3x.cli.source_options import chosen_checkpoint
from sam3x.errors import SpecError, Step
from sam3x.sources.named import encoder_source, image_source


class Low(str, Enum):
    """Values of ``sam3x doctor --precision``; ``doctor_report.BOUNDS`` has the error that each may make."""

    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


class Form(str, Enum):
    """Values of ``sam3x doctor --attention``, those of the TensorRT target."""

    LAYER = "layer"
    EXPLICIT = "explicit"


Bound = Annotated[
    float | None,
    typer.Option(
        help="Largest error against eager float32, absolute, of a pipeline's component of the largest value of each output; "
        "default 0.02 for fp16, 0.15 for bf16, 0.5 for int8."
    ),
]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as one page.")]
Tokens = Annotated[
    int | None,
    typer.Option(
        min=4, max=9216, help="Of an encoder: image tokens of the runs, where the export left them free; default 256."
    ),
]
Components = Annotated[str | None, typer.Option(metavar="A,B", help="Of a pipeline: only these components.")]
ImageSize = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="PIXELS", help="Of a pipeline: side of its pictures; smaller ones are quicker. Default: as made."
    ),
]
_TOKENS = 256


def doctor(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="An exported folder; may be left out with --pipeline.")
    ] = None,
    pipeline: Annotated[bool, typer.Option("--pipeline", help="Without FOLDER: examine the whole image model itself.")] = False,
    components: Components = None,
    precision: Annotated[Low, typer.Option(help="The precision to examine.")] = Low.FP16,
    bound: Bound = None,
    attention: Annotated[
        Form, typer.Option(help="TensorRT's layer, which may round every step of it, or products around a softmax in float32.")
    ] = Form.LAYER,
    tokens: Tokens = None,
    image_size: ImageSize = None,
    checkpoint: Checkpoint = None,
    weights_key: WeightsKey = None,
    module: Module = None,
    demo: Demo = False,
    html: Html = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Rank the operations that a lower precision ruins, and name the fewest to keep in float32.

    Each is run in that precision alone, emulated in torch: of an encoder in every branch, of a pipeline in every component.
    --checkpoint or --module as in the export.
    """
    with reporting(verbose):
        checkpoint = chosen_checkpoint(checkpoint, module, demo=demo)
        check_page(html, "--html", Step.DOCTOR)
        whole = _is_whole(folder, pipeline=pipeline)
        _check_options(whole, tokens, {"--components": components, "--image-size": image_size, "--demo": demo or None})
        with shown_steps(quiet) as steps:
            steps.begin("import torch")
            with suppressed_output(verbose):
                steps.begin("source")
                asked: dict[str, Any] = {"precision": precision.value, "bound": bound, "attention": attention.value}
                if whole:
                    from sam3x.pipeline.doctor import doctor_pipeline

                    source = image_source(None, checkpoint, module, weights_key)
                    asked |= {"components": components and components.split(","), "image_size": image_size, "folder": folder}
                    report: Any = doctor_pipeline(source, **asked, progress=steps.begin)
                else:
                    from sam3x.precision.doctor import doctor as examination

                    assert folder is not None
                    encoder = encoder_source(checkpoint, module, weights_key)
                    report = examination(folder, encoder, **asked, tokens=tokens or _TOKENS, tell=steps.begin)
            steps.end()
        from sam3x.precision import doctor_views

        reports = report.components if whole else (report,)
        if html is not None:
            html.write_text(doctor_views.doctor_page(reports), encoding="utf-8")
        if as_json:
            typer.echo(report.model_dump_json(indent=2))
        elif not quiet:
            from sam3x.cli import views as cli_views

            cli_views.show(doctor_views.doctor_view(reports))


def _is_whole(folder: Path | None, *, pipeline: bool) -> bool:
    """Tell whether a whole image model is examined; a damaged folder is refused before torch is imported.

    Raises:
        SpecError: nothing is named, or the folder holds an encoder and a pipeline is asked for.
    """
    if folder is None and not pipeline:
        fact = "there is nothing to examine"
        raise SpecError(fact, remedy="Name an exported folder, or give --pipeline.", step=Step.DOCTOR)
    if folder is None:
        return True
    from sam3x.artifact.artifact import load_any
    from sam3x.artifact.manifest import PipelineManifest

    whole = isinstance(load_any(folder), PipelineManifest)
    if pipeline and not whole:
        fact = f"{folder} holds a fusion encoder alone"
        raise SpecError(fact, subject="--pipeline", remedy="Leave --pipeline out, or the folder.", step=Step.DOCTOR)
    return whole


def _check_options(whole: bool, tokens: int | None, of_pipelines: Mapping[str, object]) -> None:
    """Refuse what has no meaning for what is examined."""
    given = [name for name, value in of_pipelines.items() if value is not None]
    if whole and tokens is not None:
        remedy = "Leave it out; the size of the pictures is --image-size."
        raise SpecError("--tokens belongs to an encoder by itself", remedy=remedy, step=Step.DOCTOR)
    if not whole and given:
        remedy = "Leave it out, or name the folder of a pipeline."
        raise SpecError(f"{', '.join(given)} belongs to a pipeline", remedy=remedy, step=Step.DOCTOR)
