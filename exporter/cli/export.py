"""``sam3x export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sam3x.cli.console import reporting, shown_steps, suppressed_output
from sam3x.cli.field_options import given_options
from sam3x.cli.options import Checkpoint, Json, Module, Quiet, Verbose, WeightsKey, named_path
from sam3x.cli.run import show_pipeline
from sam3x.cli.source_options import exclusive, named_source
from sam3x.errors import SpecError, TargetUnavailableError
from sam3x.sources.named import ImageSource, image_source


def export(
    context: typer.Context,
    target: Annotated[str, typer.Option("--target", "-t", help="Back end; see `sam3x targets`.")] = "onnx",
    output: Annotated[
        Path, typer.Option("--output", "-o", parser=named_path, metavar="FOLDER", help="Folder to write.")
    ] = Path("out"),
    checkpoint: Checkpoint = None,
    weights_key: WeightsKey = None,
    module: Module = None,
    pipeline: Annotated[bool, typer.Option("--pipeline", help="The whole image model: words in, masks out.")] = False,
    source: Annotated[
        ImageSource | None, typer.Option(help="With --pipeline: whose model; default: what the checkpoint looks like.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --pipeline: bpe_simple_vocab_16e6.txt.gz or a tokenizer.json.")
    ] = None,
    components: Annotated[
        str | None, typer.Option(metavar="A,B", help="With --pipeline: only these; see docs/compatibility.md.")
    ] = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="With --pipeline: one ONNX file for what runs for every prompt, masks included.")
    ] = False,
    disable_pass: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Leave a pass out; repeatable.")] = None,
    dump_graphs: Annotated[
        Path | None, typer.Option(parser=named_path, metavar="DIR", help="Write the graph after each pass.")
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Export the fusion encoder, or with --pipeline the whole image model, and verify what was written.

    Without --checkpoint or --module the weights are random: SAM3's own hyper-parameters, seeded.
    """
    with reporting(verbose):
        options = given_options(context)
        _check_early(target, {**({"dac": False, "pre_norm": "module"} if pipeline else {}), **options}, checkpoint, module)
        if not pipeline and (tokenizer is not None or source is not None or components is not None or fuse):
            raise SpecError(
                "--tokenizer, --source, --components and --fuse belong to --pipeline",
                remedy="Add --pipeline, or leave them out.",
            )
        if pipeline:
            from sam3x.pipeline.request import check_pipeline

            check_pipeline(target, options, None if components is None else components.split(","), fuse=fuse)
            if disable_pass or dump_graphs:
                raise SpecError("--disable-pass and --dump-graphs belong to a fusion encoder alone")
        with shown_steps(quiet) as steps:
            if checkpoint is None and module is None:
                steps.say(
                    "No --checkpoint or --module: SAM3's hyper-parameters with RANDOM weights, not a trained model.", warn=True
                )
            steps.begin("import torch")
            with suppressed_output(verbose):
                if pipeline:
                    from sam3x.pipeline import export_pipeline

                    made = export_pipeline(
                        image_source(source, checkpoint, module, weights_key),
                        progress=steps.begin,
                        target=target,
                        output=output,
                        tokenizer=tokenizer,
                        fuse=fuse,
                        **({} if components is None else {"components": components.split(",")}),
                        **options,
                    )
                else:
                    from sam3x import api

                    encoder = named_source(checkpoint, module, steps, weights_key)
                    artifact = api.export(
                        encoder,
                        target=target,
                        output=output,
                        progress=steps.begin,
                        disable_pass=tuple(disable_pass or ()),
                        dump_graphs=dump_graphs,
                        **options,
                    )
            steps.end()
        if pipeline:
            show_pipeline(made, output, as_json=as_json, quiet=quiet, verbose=verbose)
        elif as_json:
            typer.echo(artifact.manifest.model_dump_json(indent=2))
        elif not quiet:
            from sam3x.cli import views as cli_views

            cli_views.show(cli_views.export_summary(artifact.manifest, output, verbose=verbose))


def _check_early(target: str, options: dict[str, Any], checkpoint: Path | None, module: str | None) -> None:
    """Everything that can be refused before torch is imported."""
    from sam3x.targets.base import resolve
    from sam3x.targets.registry import get_target

    exclusive(checkpoint, module)
    back_end = get_target(target)
    resolve(back_end, options)
    status = back_end.availability()
    if not status.available:
        raise TargetUnavailableError(
            f"target '{target}' cannot export here: {status.detail}", remedy=f"Install it: {status.install}"
        )
