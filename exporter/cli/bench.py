"""``sam3x bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sam3x.cli.console import reporting, shown_steps
from sam3x.cli.options import Checkpoint, Json, Module, Quiet, Verbose
from sam3x.errors import SpecError, Step


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
        from sam3x.bench.report import command_of, make_request

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
                raise SpecError(
                    f"{path} cannot be written", subject=option, remedy="Name a file in a folder that exists.", step=Step.BENCH
                )
        from sam3x.bench import run as benchmark

        with shown_steps(quiet) as steps:
            report = benchmark.bench(request, command=command_of(request, files=files), tell=steps.begin)
            steps.end()
        if html is not None:
            from sam3x.bench.html import bench_page

            html.write_text(bench_page(report), encoding="utf-8")
        from sam3x.bench import views as bench_views
        from sam3x.cli import views as cli_views

        if markdown is not None:
            markdown.write_text(bench_views.bench_markdown(report), encoding="utf-8")
        if as_json:
            typer.echo(report.model_dump_json(indent=2))
        elif not quiet:
            cli_views.show(bench_views.bench_view(report))
        if report.failures:
            raise typer.Exit(1)
