"""``sam3x doctor``: which operations a lower precision ruins, and the fewest to keep in float32."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from sam3x.cli.console import reporting, shown_steps, suppressed_output
from sam3x.cli.options import Checkpoint, Folder, Json, Module, Quiet, Verbose, WeightsKey
from sam3x.cli.source_options import chosen_checkpoint
from sam3x.errors import SpecError, Step
from sam3x.sources.named import encoder_source


class Low(str, Enum):
    """Values of ``sam3x doctor --precision``; ``doctor_report.BOUNDS`` has the error that each may make."""

    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


Bound = Annotated[
    float | None,
    typer.Option(help="Largest absolute error against eager float32; default 0.02 for fp16, 0.15 for bf16, 0.5 for int8."),
]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as one page.")]
Tokens = Annotated[int, typer.Option(min=4, max=9216, help="Image tokens of the runs, where the export left them free.")]


def doctor(
    folder: Folder,
    precision: Annotated[Low, typer.Option(help="The precision to examine.")] = Low.FP16,
    bound: Bound = None,
    tokens: Tokens = 256,
    checkpoint: Checkpoint = None,
    weights_key: WeightsKey = None,
    module: Module = None,
    html: Html = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Rank the operations that a lower precision ruins, and name the fewest to keep in float32.

    Each is run in that precision alone, emulated in torch, in every branch. --checkpoint or --module as in the export.
    """
    with reporting(verbose):
        chosen_checkpoint(checkpoint, module)
        _check_page(html)
        import sam3x

        sam3x.load(folder)  # a damaged folder is told before torch is imported
        with shown_steps(quiet) as steps:
            steps.begin("import torch")
            with suppressed_output(verbose):
                steps.begin("source")
                source = encoder_source(checkpoint, module, weights_key)
                report = _examine(folder, source, precision, bound, tokens, html, steps.begin)
            steps.end()
        if as_json:
            typer.echo(report.model_dump_json(indent=2))
        elif not quiet:
            from sam3x.cli import views as cli_views
            from sam3x.precision import doctor_views

            cli_views.show(doctor_views.doctor_view(report))


def _examine(
    folder: Path, source: Any, low: Low, bound: float | None, tokens: int, html: Path | None, tell: Callable[[str], None]
) -> Any:
    """Examine, and write the page; returns the report."""
    from sam3x.precision import doctor as examination
    from sam3x.precision.doctor_views import doctor_page

    report = examination.doctor(folder, source, precision=low.value, bound=bound, tokens=tokens, tell=tell)
    if html is not None:
        html.write_text(doctor_page(report), encoding="utf-8")
    return report


def _check_page(html: Path | None) -> None:
    """Refuse a page that cannot be written before the work is done."""
    if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
        raise SpecError(
            f"{html} cannot be written", subject="--html", remedy="Name a file in a folder that exists.", step=Step.DOCTOR
        )
