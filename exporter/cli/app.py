"""The command line: every command of ``sam3x``. torch is imported once it is needed."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sam3x.cli.bench import bench
from sam3x.cli.bench_models import bench_models
from sam3x.cli.bench_pipeline import bench_pipeline
from sam3x.cli.compatibility import compatibility
from sam3x.cli.console import reporting, shown_steps, suppressed_output
from sam3x.cli.demo import demo as demo_command
from sam3x.cli.doctor import doctor
from sam3x.cli.export import export
from sam3x.cli.fidelity import fidelity
from sam3x.cli.field_options import FieldOptionsCommand
from sam3x.cli.options import Checkpoint, Demo, Folder, Json, Module, Quiet, Verbose, WeightsKey
from sam3x.cli.run import lint, show_manifest
from sam3x.cli.segment import run
from sam3x.cli.source_options import chosen_checkpoint
from sam3x.cli.web import web
from sam3x.sources.named import named_factory

app = typer.Typer(
    help="Export SAM3's fusion encoder out of PyTorch, every branch verified against the eager encoder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: Rich alone would take a third of the time --help may take
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import sam3x

        typer.echo(f"sam3x {sam3x.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


app.command(cls=FieldOptionsCommand)(export)


@app.command()
def verify(
    folder: Folder,
    checkpoint: Checkpoint = None,
    weights_key: WeightsKey = None,
    module: Module = None,
    demo: Demo = False,
    full: Annotated[bool, typer.Option("--full", help="Also at 72x72 tokens.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run an artifact, or every component of a pipeline, against the eager source again."""
    with reporting(verbose):
        checkpoint = chosen_checkpoint(checkpoint, module, demo=demo)
        from sam3x.artifact.artifact import load_any

        manifest = load_any(folder)  # a damaged folder is told before torch is imported
        with shown_steps(quiet) as steps:
            steps.begin("import torch")
            with suppressed_output(verbose):
                from sam3x.pipeline.reverify import verify_model

                steps.begin("source")
                factory = named_factory(None, checkpoint, module, weights_key, pipeline=manifest.kind == "pipeline")
                records = verify_model(folder, factory, full=full, progress=steps.begin)
            steps.end()
        if as_json:
            document = {
                "folder": str(folder),
                "passed": True,
                "records": [record.model_dump(mode="json") for record in records],
            }
            typer.echo(json.dumps(document, indent=2))
        elif not quiet:
            from sam3x.cli import views as cli_views

            cli_views.show([cli_views.verification_table(records, verbose=verbose)])


@app.command()
def inspect(
    folder: Folder,
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,…]", help="Show instead which nodes it leaves to the CPU, as in cuda or openvino."
        ),
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Show what an exported folder holds: inputs, outputs, passes, branches, figures. Needs no torch."""
    with reporting(verbose):
        from sam3x.artifact.artifact import load_any

        if provider is not None:
            from sam3x.cli.placement import show_placement

            show_placement(load_any(folder), folder, provider, as_json=as_json)
            return
        show_manifest(load_any(folder), folder, as_json=as_json, verbose=verbose, everything=True)


@app.command()
def targets(as_json: Json = False, verbose: Verbose = False) -> None:
    """List the back ends, whether they work here, and how to install the others."""
    with reporting(verbose):
        import dataclasses

        from sam3x.targets.registry import describe_targets

        statuses = describe_targets()
        if as_json:
            typer.echo(json.dumps([dataclasses.asdict(status) for status in statuses], indent=2))
        else:
            from sam3x.cli import views as cli_views

            cli_views.show([cli_views.targets_table(statuses)])


app.command(name="demo")(demo_command)
app.command()(doctor)
app.command()(bench)
app.command()(fidelity)
app.command()(run)
app.command()(web)
app.command(name="bench-pipeline")(bench_pipeline)
app.command(name="bench-models")(bench_models)
app.command()(compatibility)
app.command()(lint)


def main() -> None:
    """Entry point of the ``sam3x`` command."""
    app(prog_name="sam3x")


if __name__ == "__main__":
    main()
