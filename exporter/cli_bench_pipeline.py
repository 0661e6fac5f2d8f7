"""``sam3x bench-pipeline``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sam3x.cli_frame import reporting, shown_steps

if TYPE_CHECKING:
    from rich.table import Table

    from sam3x.bench_pipeline import PipelineReport


def bench_pipeline(
    folder: Annotated[Path, typer.Argument(help="What `sam3x export --pipeline` wrote.", metavar="FOLDER")],
    checkpoint: Annotated[Path | None, typer.Option(help="The pipeline's source, as in its export.", metavar="FILE")] = None,
    module: Annotated[str | None, typer.Option(help="The same.", metavar="PACKAGE.MODULE:FACTORY")] = None,
    picture: Annotated[Path | None, typer.Option(help="Default: 1008x1008 pixels of noise.", metavar="PICTURE")] = None,
    threshold: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Detections score above it.")] = None,
    eager: Annotated[bool, typer.Option("--eager/--no-eager", help="Run the source beside it.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="Of both.")] = 2,
    repeat: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 3,
    timeout: Annotated[float, typer.Option(help="Seconds that one step may take.")] = 900.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the traceback of an error.")] = False,
) -> None:
    """Time a pipeline against its source's eager code: latency, memory, start; and what its export took."""
    with reporting(verbose):
        from sam3x import bench_pipeline as benchmark

        with shown_steps(quiet) as steps:
            report = benchmark.bench_pipeline(
                folder,
                checkpoint=checkpoint,
                module=module,
                eager=eager,
                picture=picture,
                threshold=threshold,
                threads=threads,
                repeat=repeat,
                timeout=timeout,
                tell=steps.begin,
            )
            steps.end()
        if as_json:
            typer.echo(report.model_dump_json(indent=2))
        elif not quiet:
            from sam3x import cli_views

            cli_views.show([*_lines(report), _table(report)])


def _lines(report: PipelineReport) -> list[str]:
    lines = [f"{report.folder}: {report.origin}", f"exported in {report.export.get('total_seconds', 0):,.0f} s"]
    lines[-1] += f", peak memory {report.export.get('peak_rss_mb', 0):,.0f} MB"
    if report.ratio is not None:
        lines.append(f"latency {report.ratio:.2f} of eager, scores within {report.largest_score_gap:.1e}")
    return lines


def _table(report: PipelineReport) -> Table:
    from sam3x.cli_views import plain_table

    shown = plain_table(
        f"{report.threads} threads", "contender", "start", "first result", "median run", "peak memory", "detections"
    )
    for name, item in report.contenders.items():
        shown.add_row(
            name,
            f"{item.start_seconds:.2f} s",
            f"{item.first_seconds:.2f} s",
            f"{item.median:.2f} s",
            f"{item.peak_mb:,.0f} MB",
            str(item.detections),
        )
    return shown
