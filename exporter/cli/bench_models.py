"""``sam3x bench-models``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from sam3x.cli.console import reporting, shown_steps
from sam3x.cli.options import Checkpoint, Json, Module, Quiet, Verbose, check_page, named_path
from sam3x.cli.source_options import chosen_checkpoint
from sam3x.errors import SpecError, Step, did_you_mean


def bench_models(
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="sam3, efficient-sam3 and small with random weights, or demo; repeatable."),
    ] = None,
    checkpoint: Checkpoint = None,
    module: Module = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", metavar="NAME[:PRECISION[:SM]]", help="As pte:fp16 or trt:fp16:sm89; repeatable."),
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, metavar="PIXELS", help="As of sam3x export.")] = None,
    keep: Annotated[
        Path | None,
        typer.Option(parser=named_path, metavar="FOLDER", help="Keep exports and figures; what is there is not made again."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Detections of the runs score above it; default: the model's own.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of the runs.")] = 2,
    repeat: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 3,
    timeout: Annotated[float, typer.Option(help="Seconds that an export, or one step of a run, may take.")] = 3600.0,
    page: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Also write the figures as a page.")] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Export whole models to targets in precisions: sizes, time and memory of the exports and, beside eager, of runs."""
    with reporting(verbose):
        from sam3x.bench import models as benchmark

        known = benchmark.MODELS
        chosen_checkpoint(checkpoint, module)
        named = list(model or ())
        unknown = [name for name in named if name not in known]
        if unknown:
            near = did_you_mean(unknown[0], known)
            remedy = f"{near} There are {', '.join(known)}; others by --checkpoint or --module.".lstrip()
            raise SpecError(f"no model '{unknown[0]}'", subject="--model", remedy=remedy, step=Step.BENCH)
        models = {name: known[name] for name in named}
        if checkpoint is not None:
            models[checkpoint.stem] = ("--checkpoint", str(checkpoint))
        if module is not None:
            models[module.rpartition(":")[2]] = ("--module", module)
        if not models:
            remedy = f"Give --model ({', '.join(known)}), --checkpoint or --module."
            raise SpecError("no model is named", remedy=remedy, step=Step.BENCH)
        check_page(page, "--markdown", Step.BENCH)
        kinds = [benchmark.Kind.of(text) for text in target or ["onnx"]]
        options = [] if image_size is None else ["--image-size", str(image_size)]
        with shown_steps(quiet) as steps:
            report = benchmark.bench_models(
                models,
                kinds,
                options=options,
                keep=keep,
                threshold=threshold,
                threads=threads,
                repeat=repeat,
                timeout=timeout,
                tell=steps.begin,
            )
            steps.end()
        from sam3x.cli import bench_models_views as views
        from sam3x.cli import views as cli_views

        if page is not None:
            words = ["sam3x", "bench-models", *(word for name in named for word in ("--model", name))]
            words += ["--checkpoint", str(checkpoint)] if checkpoint else ["--module", module] if module else []
            words += [*(word for kind in kinds for word in ("--target", kind.name)), *options]
            words += [] if threshold is None else ["--threshold", str(threshold)]
            words += ["--threads", str(threads), "--repeat", str(repeat), "--markdown", str(page)]
            page.write_text(views.markdown(report, shlex.join(words)), encoding="utf-8")
        if as_json:
            typer.echo(report.model_dump_json(indent=2))
        elif not quiet:
            cli_views.show(views.view(report))
        if any(row.failed for row in report.rows):
            raise typer.Exit(1)
