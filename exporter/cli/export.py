"""``sam3x export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sam3x.cli.console import reporting, shown_steps, suppressed_output
from sam3x.cli.field_options import given_options
from sam3x.cli.options import Checkpoint, Demo, Json, Module, Quiet, Verbose, WeightsKey, named_path
from sam3x.cli.run import show_manifest
from sam3x.cli.source_options import chosen_checkpoint
from sam3x.errors import SpecError
from sam3x.pipeline.request import check_available, resolve, resolve_pipeline
from sam3x.sources.named import ImageSource, named_factory


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
    demo: Demo = False,
    source: Annotated[
        ImageSource | None, typer.Option(help="With --pipeline: whose model; default: what the checkpoint looks like.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --pipeline: bpe_simple_vocab_16e6.txt.gz or tokenizer.json. None: the source's, or that of sam3.",
        ),
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
        checkpoint = chosen_checkpoint(checkpoint, module, demo=demo)
        if not pipeline and (tokenizer is not None or source is not None or components is not None or fuse or demo):
            raise SpecError(
                "--tokenizer, --source, --components, --fuse and --demo belong to --pipeline",
                remedy="Add --pipeline, or leave them out.",
            )
        passes: dict[str, Any] = {"disable_pass": disable_pass or (), "dump_graphs": dump_graphs}
        if pipeline:
            chosen = None if components is None else components.split(",")
            request = resolve_pipeline(target, options, components=chosen, fuse=fuse, **passes)
        else:
            request = resolve(target, options, **passes)
        check_available(request.target)
        with shown_steps(quiet) as steps:
            if checkpoint is None and module is None:
                steps.say(
                    "No --checkpoint or --module: SAM3's hyper-parameters with RANDOM weights, not a trained model.", warn=True
                )
            steps.begin("import torch")
            with suppressed_output(verbose):
                from sam3x.pipeline import export as exporter

                steps.begin("source")
                factory = named_factory(source, checkpoint, module, weights_key, pipeline=pipeline)
                manifest = exporter.export_model(request, factory, output, tokenizer=tokenizer, progress=steps.begin)
            steps.end()
        show_manifest(manifest, output, as_json=as_json, quiet=quiet, verbose=verbose)
