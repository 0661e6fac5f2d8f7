"""The command line: ``sam3x export | verify | inspect | targets | doctor | bench``. torch is imported once it is needed."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam3x import cli_doctor
from sam3x.cli_bench_pipeline import bench_pipeline
from sam3x.cli_compatibility import compatibility
from sam3x.cli_frame import hushed, reporting, shown_steps
from sam3x.cli_pipeline import ImageSource, check_pipeline_options, image_source, lint, run, show_pipeline
from sam3x.cli_target_options import TargetOptionsCommand, target_options_of
from sam3x.errors import SpecError, TargetUnavailableError

if TYPE_CHECKING:
    from sam3x.cli_views import Steps
    from sam3x.sources import Source

app = typer.Typer(
    help="Export SAM3's fusion encoder out of PyTorch, every branch verified against the eager encoder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: Rich alone would take a third of the time --help may take
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


Folder = Annotated[Path, typer.Argument(help="An exported folder.", metavar="FOLDER")]
Checkpoint = Annotated[Path | None, typer.Option("--checkpoint", help="SAM3 or EfficientSAM3 .pt, .pth or .safetensors.")]
Module = Annotated[
    str | None,
    typer.Option("--module", metavar="PKG.MOD:FACTORY", help="A callable that returns the encoder, or the encoder itself."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print more, and the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; progress goes to stderr.")]


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


@app.command(cls=TargetOptionsCommand)
def export(
    context: typer.Context,
    target: Annotated[str, typer.Option("--target", "-t", help="Back end; see `sam3x targets`.")] = "onnx",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("out"),
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
    dump_graphs: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the graph after each pass.")] = None,
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
        _check_early(target, options, checkpoint, module)
        if not pipeline and (tokenizer is not None or source is not None or components is not None or fuse):
            raise SpecError("step 1/4 spec: --tokenizer, --source, --components and --fuse belong to --pipeline.")
        if pipeline:
            check_pipeline_options(
                target, options, fuse=fuse, components=components, disable_pass=disable_pass, dump_graphs=dump_graphs
            )
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
                    steps.end()
                    show_pipeline(made, output, as_json=as_json, quiet=quiet, verbose=verbose)
                    return
                from sam3x import api

                encoder = _source(checkpoint, module, steps)
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
        if as_json:
            typer.echo(artifact.manifest.model_dump_json(indent=2))
        elif not quiet:
            from sam3x import cli_views

            cli_views.show(cli_views.export_summary(artifact.manifest, output, verbose=verbose))


@app.command()
def verify(
    folder: Folder,
    checkpoint: Checkpoint = None,
    module: Module = None,
    full: Annotated[bool, typer.Option("--full", help="Also at 72x72 tokens.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run an artifact, or every component of a pipeline, against the eager source again."""
    with reporting(verbose):
        _exclusive(checkpoint, module)
        import sam3x
        from sam3x.runtime.manifest import is_pipeline, load_manifest

        whole = is_pipeline(folder)
        (load_manifest if whole else sam3x.load)(folder)  # a damaged folder is told before torch is imported
        with shown_steps(quiet) as steps:
            steps.begin("import torch")
            with hushed(verbose):
                if whole:
                    from sam3x.pipeline import verify_pipeline

                    steps.begin("verify")
                    records = verify_pipeline(folder, image_source(None, checkpoint, module), full=full)
                else:
                    from sam3x import api

                    source = _source(checkpoint, module, steps)
                    steps.begin("verify")
                    records = api.verify(folder, source, full=full)
            steps.end()
        if as_json:
            document = {
                "folder": str(folder),
                "passed": True,
                "records": [record.model_dump(mode="json") for record in records],
            }
            typer.echo(json.dumps(document, indent=2))
        elif not quiet:
            from sam3x import cli_views

            cli_views.show([cli_views.verification_table(records, verbose=verbose)])


@app.command()
def inspect(folder: Folder, verbose: Verbose = False, as_json: Json = False) -> None:
    """Show what an exported folder holds: inputs, outputs, passes, branches, figures. Needs no torch."""
    with reporting(verbose):
        import sam3x
        from sam3x.runtime.manifest import is_pipeline, load_manifest

        if is_pipeline(folder):
            show_pipeline(load_manifest(folder), folder, as_json=as_json, quiet=False, verbose=verbose)
            return
        manifest = sam3x.load(folder).manifest
        if as_json:
            typer.echo(manifest.model_dump_json(indent=2))
        else:
            from sam3x import cli_views

            cli_views.show(cli_views.manifest_view(manifest, folder, verbose=verbose))


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
            from sam3x import cli_views

            cli_views.show([cli_views.targets_table(statuses)])


@app.command()
def doctor(
    folder: Folder,
    precision: Annotated[cli_doctor.Low, typer.Option(help="The precision to examine.")] = cli_doctor.Low.FP16,
    bound: cli_doctor.Bound = None,
    tokens: cli_doctor.Tokens = 256,
    checkpoint: Checkpoint = None,
    module: Module = None,
    html: cli_doctor.Html = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Rank the operations that a lower precision ruins, and name the fewest to keep in float32.

    Each is run in that precision alone, emulated in torch, in every branch. --checkpoint or --module as in the export.
    """
    with reporting(verbose):
        _exclusive(checkpoint, module)
        cli_doctor.check_page(html)
        import sam3x

        sam3x.load(folder)  # a damaged folder is told before torch is imported
        with shown_steps(quiet) as steps:
            steps.begin("import torch")
            with hushed(verbose):
                source = _source(checkpoint, module, steps)
                report = cli_doctor.run_doctor(folder, source, precision, bound, tokens, html, steps.begin)
            steps.end()
        if as_json:
            typer.echo(report.model_dump_json(indent=2))
        elif not quiet:
            from sam3x import cli_views, doctor_views

            cli_views.show(doctor_views.doctor_view(report))


@app.command()
def bench(
    folders: Annotated[list[Path] | None, typer.Argument(help="Exported folders.", metavar="FOLDER...")] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option("--baseline", metavar="NAME", help="eager, onnx-default, inductor or openvino; repeatable."),
    ] = None,
    tokens: Annotated[str, typer.Option(metavar="N,N", help="Image tokens; a table for each.")] = "5184",
    batch: Annotated[int, typer.Option(help="Images.")] = 1,
    prompt_length: Annotated[int, typer.Option(help="Prompt tokens.")] = 32,
    branch: Annotated[
        list[str] | None, typer.Option(metavar="dac=off,pre_norm=on", help="The flags; SAM3's own by default; repeatable.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="NAME", help="Contender that ratios are against; default: the first baseline.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Of every contender.")] = 2,
    repeat: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
    warmup: Annotated[int, typer.Option(help="Rounds before them.")] = 1,
    checkpoint: Checkpoint = None,
    module: Module = None,
    seed: Annotated[int, typer.Option(help="Of the inputs, and of the baselines' random weights.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds that one step of one contender may take.")] = 900.0,
    profile: Annotated[bool, typer.Option("--profile", help="Also time by operator (.pte), in runs of their own.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one page with charts.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the tables as Markdown.")] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Time artifacts and baselines in turn: latency, memory, cold start, file size.

    Each contender runs in a process of its own; one that fails is told in the table and makes the exit status 1.
    --checkpoint and --module name the encoder of the baselines, as for export.
    """
    with reporting(verbose):
        from sam3x.bench_report import command_of, make_request

        request = make_request(
            folders=folders or (),
            baselines=baseline or (),
            tokens=tokens,
            branches=branch or (),
            batch=batch,
            prompt_length=prompt_length,
            reference=reference,
            threads=threads,
            repeat=repeat,
            warmup=warmup,
            checkpoint=None if checkpoint is None else str(checkpoint),
            module=module,
            seed=seed,
            timeout=timeout,
            profile=profile or None,
        )
        files = {"--html": html, "--markdown": markdown}
        for option, path in files.items():
            if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
                raise SpecError(f"bench: {option}: {path} cannot be written. Name a file in a folder that exists.")
        from sam3x import bench as benchmark

        with shown_steps(quiet) as steps:
            report = benchmark.bench(request, command=command_of(request, files=files), tell=steps.begin)
            steps.end()
        if html is not None:
            from sam3x.bench_html import bench_page

            html.write_text(bench_page(report), encoding="utf-8")
        from sam3x import bench_views, cli_views

        if markdown is not None:
            markdown.write_text(bench_views.bench_markdown(report), encoding="utf-8")
        if as_json:
            typer.echo(report.model_dump_json(indent=2))
        elif not quiet:
            cli_views.show(bench_views.bench_view(report))
        if report.failures:
            raise typer.Exit(1)


app.command()(run)
app.command(name="bench-pipeline")(bench_pipeline)
app.command()(compatibility)
app.command()(lint)


def _flag(value: Dac | PreNorm | None) -> str | bool | None:
    """``on`` and ``off`` are the spec's True and False."""
    return None if value is None else {"on": True, "off": False}.get(value.value, value.value)


def _feature_sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = []
    for part in text.split(","):
        height, _, width = part.strip().lower().partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            raise SpecError(f"step 1/4 spec: --feature-sizes: expected HxW for each level, as in 72x72,36x36, got {text!r}.")
        sizes.append((int(height), int(width)))
    return tuple(sizes)


def _exclusive(checkpoint: Path | None, module: str | None) -> None:
    if checkpoint is not None and module is not None:
        raise SpecError("step 1/4 spec: --checkpoint and --module both name the encoder. Give one of them.")


def _check_early(target: str, options: dict[str, Any], checkpoint: Path | None, module: str | None) -> None:
    """Everything that can be refused before torch is imported."""
    from sam3x.targets.base import resolve
    from sam3x.targets.registry import get_target

    _exclusive(checkpoint, module)
    back_end = get_target(target)
    resolve(back_end, options)
    status = back_end.availability()
    if not status.available:
        raise TargetUnavailableError(
            f"step 1/4 spec: target '{target}' cannot export here: {status.detail}. Install it: {status.install}"
        )


def _source(checkpoint: Path | None, module: str | None, steps: Steps) -> Source | None:
    """None is the seeded default, which the API builds."""
    steps.begin("source")
    if checkpoint is None and module is None:
        return None
    from sam3x import sources

    return sources.factory_source(module) if module is not None else sources.checkpoint_source(str(checkpoint))


def main() -> None:
    """Entry point of the ``sam3x`` command."""
    app(prog_name="sam3x")


if __name__ == "__main__":
    main()
