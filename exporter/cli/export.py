"""``sam3x export``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from sam3x.cli.console import hushed, reporting, shown_steps
from sam3x.cli.options import Checkpoint, Json, Module, Quiet, Verbose, named_path
from sam3x.cli.run import show_pipeline
from sam3x.cli.source_options import exclusive, named_source
from sam3x.cli.target_options import target_options_of
from sam3x.errors import SpecError, TargetUnavailableError
from sam3x.sources.named import ImageSource, image_source


class Interface(str, Enum):
    """Values of ``--interface``, the signature of the graph; ``ExportSpec.interface`` says what each is."""

    TOKENS = "tokens"
    FEATURE_MAPS = "feature-maps"


class Dac(str, Enum):
    """Values of ``--dac``: a graph input, or fixed. On and off are the True and False of ``ExportSpec.dac``."""

    RUNTIME = "runtime"
    ON = "on"
    OFF = "off"


class PreNorm(str, Enum):
    """Values of ``--pre-norm``; ``ExportSpec.pre_norm`` says what each is. On and off are its True and False."""

    RUNTIME = "runtime"
    ON = "on"
    OFF = "off"
    MODULE = "module"
    PER_LAYER = "per-layer"


class Branches(str, Enum):
    """Values of ``--branches``, what a runtime flag becomes; ``ExportSpec.branches`` says what each is."""

    COND = "cond"
    SELECT = "select"


class MaskDtype(str, Enum):
    """Values of ``--mask-dtype``; ``ExportSpec.mask_dtype`` says what each means."""

    BOOL = "bool"
    FLOAT32 = "float32"


class Verify(str, Enum):
    """Values of ``--verify``, what is compared with eager; ``ExportSpec.verify`` says what each is."""

    OFF = "off"
    FINAL = "final"
    EACH = "each"
    FULL = "full"


def export(
    context: typer.Context,
    target: Annotated[str, typer.Option("--target", "-t", help="Back end; see `sam3x targets`.")] = "onnx",
    output: Annotated[
        Path, typer.Option("--output", "-o", parser=named_path, metavar="FOLDER", help="Folder to write.")
    ] = Path("out"),
    checkpoint: Checkpoint = None,
    module: Module = None,
    interface: Annotated[Interface | None, typer.Option(help="Signature of the graph; default tokens.")] = None,
    inputs: Annotated[str | None, typer.Option(metavar="A,B,C", help="Tensor inputs; default: those SAM3 uses.")] = None,
    dac: Annotated[Dac | None, typer.Option(help="runtime (default) makes it a graph input.")] = None,
    pre_norm: Annotated[PreNorm | None, typer.Option(help="runtime (default) makes it a graph input.")] = None,
    dac_dim: Annotated[int | None, typer.Option(min=0, max=1, help="Dimension of tgt that dac halves; default 0.")] = None,
    branches: Annotated[
        Branches | None, typer.Option(help="Runtime flags as conditionals or as data flow; default: what the target runs best.")
    ] = None,
    batch: Annotated[str | None, typer.Option(metavar="N|MIN:MAX", help="Batch size; default 1:8.")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="N|MIN:MAX", help="Image tokens; default 16:9216.")] = None,
    prompt_length: Annotated[str | None, typer.Option(metavar="N|MIN:MAX", help="Prompt tokens; default 1:77.")] = None,
    feature_sizes: Annotated[
        str | None, typer.Option(metavar="HxW,HxW", help="One size a level, with --interface feature-maps; default 72x72.")
    ] = None,
    mask_dtype: Annotated[MaskDtype | None, typer.Option(help="Of tgt_mask and memory_mask; default bool.")] = None,
    verify: Annotated[Verify | None, typer.Option(help="What is compared with eager; default final.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of random weights and of the verification inputs; default 0.")] = None,
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
        options: dict[str, Any] = {
            "interface": interface and interface.value.replace("-", "_"),
            "inputs": inputs,
            "dac": _flag(dac),
            "pre_norm": _flag(pre_norm),
            "dac_dim": dac_dim,
            "branches": branches and branches.value,
            "batch": batch,
            "tokens": tokens,
            "prompt_length": prompt_length,
            "feature_sizes": None if feature_sizes is None else _feature_sizes(feature_sizes),
            "mask_dtype": mask_dtype and mask_dtype.value,
            "verify": verify and verify.value,
            "seed": seed,
        }
        options = {name: value for name, value in options.items() if value is not None}  # ExportSpec's defaults rule
        options.update(target_options_of(context))
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
            with hushed(verbose):
                if pipeline:
                    from sam3x.pipeline import export_pipeline

                    made = export_pipeline(
                        image_source(source, checkpoint, module),
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

                    encoder = named_source(checkpoint, module, steps)
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


def _flag(value: Dac | PreNorm | None) -> str | bool | None:
    """``on`` and ``off`` are the spec's True and False."""
    return None if value is None else {"on": True, "off": False}.get(value.value, value.value)


def _feature_sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = []
    for part in text.split(","):
        height, _, width = part.strip().lower().partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            raise SpecError(f"expected HxW for each level, as in 72x72,36x36, got {text!r}", subject="--feature-sizes")
        sizes.append((int(height), int(width)))
    return tuple(sizes)


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
