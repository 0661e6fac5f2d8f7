"""``sam3x compatibility``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sam3x.cli.console import reporting, shown_steps, suppressed_output
from sam3x.cli.options import check_page
from sam3x.errors import SpecError, Step

if TYPE_CHECKING:
    from sam3x.cli.views import Steps


def compatibility(
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="Only these; repeatable.")] = None,
    tools: Annotated[
        bool, typer.Option("--tools", help="Instead: which runtimes and tools read the ONNX files, in every form of them.")
    ] = False,
    runtimes: Annotated[
        bool, typer.Option("--runtimes", help="Instead: each form of --for in the runtimes here, with latency and memory.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the page as Markdown.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the traceback of an error.")] = False,
) -> None:
    """Try every component of a small image model on every target: what is taken, and why the rest is not. Takes minutes."""
    with reporting(verbose):
        check_page(output, "--output", Step.COMPATIBILITY)
        if sum(map(bool, (tools, runtimes, target))) > 1:
            fact = "--target, --tools and --runtimes are pages of their own"
            raise SpecError(fact, remedy="Take one of them.", step=Step.COMPATIBILITY)
        with shown_steps(quiet) as steps:
            steps.begin("import torch")
            with suppressed_output(verbose):
                if tools:
                    from sam3x.bench import portability

                    page = portability.markdown(portability.portability(steps.begin))
                elif runtimes:
                    from sam3x.bench import runtimes as forms

                    page = forms.markdown(forms.runtimes(steps.begin))
                else:
                    page = _of_targets(target, steps)
            steps.end()
        if output is not None:
            output.write_text(page, encoding="utf-8")
        elif not quiet:
            typer.echo(page)


def _of_targets(target: list[str] | None, steps: Steps) -> str:
    from sam3x.pipeline import compatibility as matrix
    from sam3x.targets.registry import get_target

    chosen = {name: matrix.TARGETS.get(name, {}) for name in target or matrix.TARGETS}
    found = matrix.compatibility(chosen, steps.begin)
    versions: dict[str, str] = {}
    for name in chosen:
        back_end = get_target(name)
        versions |= back_end.versions() if back_end.availability().available else {}
    return matrix.markdown(found, versions)
