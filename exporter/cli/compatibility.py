"""``sam3x compatibility``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sam3x.cli.console import reporting, shown_steps, suppressed_output


def compatibility(
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="Only these; repeatable.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the page as Markdown.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the traceback of an error.")] = False,
) -> None:
    """Try every component of a small image model on every target: what is taken, and why the rest is not. Takes minutes."""
    from sam3x.errors import SpecError, Step

    with reporting(verbose):
        if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
            raise SpecError(
                f"{output} cannot be written", remedy="Name a file in a folder that exists.", step=Step.COMPATIBILITY
            )
        with shown_steps(quiet) as steps:
            steps.begin("import torch")
            with suppressed_output(verbose):
                from sam3x.pipeline import compatibility as matrix
                from sam3x.targets.registry import get_target

                chosen = {name: matrix.TARGETS.get(name, {}) for name in target or matrix.TARGETS}
                found = matrix.compatibility(chosen, steps.begin)
                versions: dict[str, str] = {}
                for name in chosen:
                    back_end = get_target(name)
                    versions |= back_end.versions() if back_end.availability().available else {}
            steps.end()
        page = matrix.markdown(found, versions)
        if output is not None:
            output.write_text(page, encoding="utf-8")
        elif not quiet:
            typer.echo(page)
