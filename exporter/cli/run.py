"""``sam3x lint``, and what an export is shown as."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sam3x.cli.console import reporting, suppressed_output
from sam3x.cli.options import WeightsKey

if TYPE_CHECKING:
    from sam3x.artifact.manifest import Manifest


def lint(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A .pt, .pth, .ckpt or .safetensors file, or a folder of transformers'.", metavar="CHECKPOINT"),
    ],
    weights_key: WeightsKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every name, and the traceback of an error.")] = False,
) -> None:
    """Tell which image model a checkpoint holds and what is wrong with it; exit status 1 if something is."""
    with reporting(verbose):
        with suppressed_output(verbose):
            from sam3x.sources.lint import lint as look

            report = look(checkpoint, weights_key)
        if as_json:
            typer.echo(report.model_dump_json(indent=2))
        else:
            from sam3x.cli import pipeline_views
            from sam3x.cli import views as cli_views

            cli_views.show(pipeline_views.lint_view(report, verbose=verbose))
        if not report.clean:
            raise typer.Exit(1)


def show_manifest(
    manifest: Manifest, folder: Path, *, as_json: bool, quiet: bool = False, verbose: bool, everything: bool = False
) -> None:
    """The manifest as JSON, or as tables: what an export made, or everything there is to tell."""
    if as_json:
        typer.echo(manifest.model_dump_json(indent=2))
    elif not quiet:
        from sam3x.cli import pipeline_views
        from sam3x.cli import views as cli_views

        cli_views.show(pipeline_views.manifest_parts(manifest, folder, verbose=verbose, everything=everything))
