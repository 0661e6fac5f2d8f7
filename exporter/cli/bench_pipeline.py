"""``sam3x bench-pipeline``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from sam3x.cli.console import reporting, shown_steps
from sam3x.cli.options import check_page
from sam3x.errors import Step


def bench_pipeline(
    folder: Annotated[Path, typer.Argument(help="What `sam3x export --pipeline` wrote.", metavar="FOLDER")],
    checkpoint: Annotated[Path | None, typer.Option(help="The pipeline's source, as in its export.", metavar="FILE")] = None,
    module: Annotated[str | None, typer.Option(help="The same.", metavar="PACKAGE.MODULE:FACTORY")] = None,
    picture: Annotated[Path | None, typer.Option(help="Default: 1008x1008 pixels of noise.", metavar="PICTURE")] = None,
    threshold: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Detections score above it.")] = None,
    click: Annotated[
        bool, typer.Option("--click", help="A click on a picture whose features are there, in place of a search.")
    ] = False,
    eager: Annotated[bool, typer.Option("--eager/--no-eager", help="Run the source beside it.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="Of both.")] = 2,
    repeat: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 3,
    timeout: Annotated[float, typer.Option(help="Seconds that one step may take.")] = 900.0,
    page: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Also write the figures as a page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the traceback of an error.")] = False,
) -> None:
    """Time a pipeline against its source's eager code: latency, memory, start; and what its export took."""
    with reporting(verbose):
        check_page(page, "--markdown", Step.BENCH)
        measure_pipeline(
            folder,
            page=page,
            as_json=as_json,
            quiet=quiet,
            command="bench-pipeline",
            checkpoint=checkpoint,
            module=module,
            eager=eager,
            picture=picture,
            threshold=threshold,
            click=click,
            threads=threads,
            repeat=repeat,
            timeout=timeout,
        )


def measure_pipeline(folder: Path, *, page: Path | None, as_json: bool, quiet: bool, command: str, **options: Any) -> None:
    """Measure a pipeline and show the figures.

    Args:
        command: the one that is run, for the page. options: of ``sam3x.bench.pipeline.bench_pipeline``.
    """
    from sam3x.bench import pipeline as benchmark

    with shown_steps(quiet) as steps:
        report = benchmark.bench_pipeline(folder, **options, tell=steps.begin)
        steps.end()
    from sam3x.artifact.manifest import SEGMENTER
    from sam3x.cli import bench_pipeline_views as views

    if page is not None:
        source = [word for name in ("checkpoint", "module") if options[name] for word in (f"--{name}", str(options[name]))]
        whole = {"decoder", SEGMENTER} & set(report.components)
        parts = [] if whole else ["--components", ",".join(report.components)]
        export = ["sam3x", "export", "--pipeline", *source, *parts, "-o", str(folder)]
        own = ["--baseline", "eager"] if command == "bench" and options["eager"] else []
        words = ["sam3x", command, str(folder), *source, *own]
        asked = {name: options[name] for name in ("threads", "repeat", "picture", "threshold")}
        words += ["--click"] if options.get("click") else []
        words += [str(word) for name, value in asked.items() if value is not None for word in (f"--{name}", value)]
        words += ["--markdown", str(page)]
        page.write_text(views.markdown(report, shlex.join(words), shlex.join(export)), encoding="utf-8")
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    elif not quiet:
        from sam3x.cli import views as cli_views

        cli_views.show([*views.summary(report), views.table(report)])
