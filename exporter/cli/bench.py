"""``sam3x bench``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sam3x.cli.bench_pipeline import measure_pipeline
from sam3x.cli.console import reporting, shown_steps
from sam3x.cli.options import Checkpoint, Json, Module, Quiet, Verbose, check_page
from sam3x.errors import SpecError, Step


def bench(
    folders: Annotated[list[Path] | None, typer.Argument(help="Exported folders.", metavar="FOLDER...")] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option("--baseline", metavar="NAME", help="eager, onnx-default, inductor or openvino; repeatable."),
    ] = None,
    tokens: Annotated[str | None, typer.Option(metavar="N,N", help="Image tokens; a table for each; default 5184.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images; default 1.")] = None,
    prompt_length: Annotated[int | None, typer.Option(help="Prompt tokens; default 32.")] = None,
    branch: Annotated[
        list[str] | None, typer.Option(metavar="dac=off,pre_norm=on", help="The flags; SAM3's own by default; repeatable.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="NAME", help="Contender that ratios are against; default: the first baseline.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Of every contender.")] = 2,
    repeat: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
    warmup: Annotated[int | None, typer.Option(help="Rounds before them; default 1.")] = None,
    checkpoint: Checkpoint = None,
    module: Module = None,
    seed: Annotated[int | None, typer.Option(help="Of the inputs, and of the baselines' random weights; default 0.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one step of one contender may take.")] = 900.0,
    profile: Annotated[bool, typer.Option("--profile", help="Also time by operator, ONNX and .pte, in own runs.")] = False,
    picture: Annotated[Path | None, typer.Option(metavar="PICTURE", help="Of a pipeline; default: noise.")] = None,
    threshold: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Of a pipeline: detections score above it.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one page with charts.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the tables as Markdown.")] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Time artifacts and baselines in turn: latency, memory, cold start, file size.

    Each contender runs in a process of its own; one that fails is told in the table and makes the exit status 1.
    --checkpoint and --module name the encoder of the baselines, as for export. A whole pipeline is measured alone, with
    --baseline eager beside its source.
    """
    with reporting(verbose):
        files = {"--html": html, "--markdown": markdown}
        for option, path in files.items():
            check_page(path, option, Step.BENCH)
        from sam3x.artifact.manifest import is_pipeline

        sizes: dict[str, Any] = {
            "tokens": tokens,
            "batch": batch,
            "prompt_length": prompt_length,
            "warmup": warmup,
            "seed": seed,
        }
        if any(is_pipeline(folder) for folder in folders or ()):
            others = {**sizes, "branch": branch, "reference": reference, "profile": profile or None, "html": html}
            _refuse(others, "of a fusion encoder", step=Step.BENCH)
            if len(folders or ()) > 1 or set(baseline or ()) - {"eager"}:
                remedy = "Name one folder, and no baseline but eager."
                raise SpecError("a pipeline is measured alone or beside its source", remedy=remedy, step=Step.BENCH)
            measure_pipeline(
                (folders or [])[0],
                page=markdown,
                as_json=as_json,
                quiet=quiet,
                command="bench",
                checkpoint=checkpoint,
                module=module,
                eager=bool(baseline),
                picture=picture,
                threshold=threshold,
                threads=threads,
                repeat=repeat,
                timeout=timeout,
            )
            return
        _refuse({"picture": picture, "threshold": threshold}, "of a pipeline", step=Step.BENCH)
        from sam3x.bench.report import command_of, make_request

        request = make_request(
            folders=folders or (),
            baselines=baseline or (),
            branches=branch or (),
            reference=reference,
            threads=threads,
            repeat=repeat,
            checkpoint=None if checkpoint is None else str(checkpoint),
            module=module,
            timeout=timeout,
            profile=profile or None,
            **{name: value for name, value in sizes.items() if value is not None},
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


def _refuse(options: Mapping[str, object], subject: str, step: Step) -> None:
    """Refuse options that were given and belong to something else.

    Raises:
        SpecError: naming them.
    """
    given = ", ".join(f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None)
    if given:
        raise SpecError(f"{given}: {subject} alone", remedy="Leave it out.", step=step)
