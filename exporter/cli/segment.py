"""``sam3x run``: pictures and prompts in, detections out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sam3x.cli.console import reporting
from sam3x.errors import SpecError, Step

Boxes = Annotated[
    list[str] | None,
    typer.Option("--box", metavar="X0,Y0,X1,Y1", help="An example in pixels; repeatable. With a minus in front: not wanted."),
]


def run(
    folder: Annotated[Path, typer.Argument(help="What `sam3x export --pipeline` wrote.", metavar="FOLDER")],
    picture: Annotated[Path, typer.Argument(help="A JPEG, PNG or WebP file.", metavar="PICTURE")],
    text: Annotated[list[str] | None, typer.Option("--text", metavar="WORDS", help="What to look for; repeatable.")] = None,
    box: Boxes = None,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Detections score above it; default: what the source has.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the picture with masks and boxes.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write detections and masks.")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare every file with its sha256 first.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the traceback of an error.")] = False,
) -> None:
    """Find what words or boxes describe in a picture. Needs no torch."""
    with reporting(verbose):
        boxes, labels = parse_boxes(box or ())
        if not text and not boxes:
            raise SpecError("nothing to look for", remedy="Give --text or --box.", step=Step.RUN)
        for path in (output, json_file):
            if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
                raise SpecError(f"{path} cannot be written", remedy="Name a file in a folder that exists.", step=Step.RUN)
        from sam3x.runtime import Segmenter

        segmenter = Segmenter(folder, check=check)
        found = segmenter.segment(picture, text or None, boxes or None, labels or None, threshold=threshold)
        if output is not None:
            found.draw(output)
        if json_file is not None:
            found.write_json(json_file)
        if not quiet:
            from sam3x.cli import pipeline_views
            from sam3x.cli import views as cli_views

            cli_views.show([pipeline_views.detections_view(found)])


def parse_boxes(given: list[str] | tuple[str, ...]) -> tuple[list[list[float]], list[bool]]:
    """``10,20,200,180`` → the box and True; ``-10,20,200,180`` → the same and False.

    Raises:
        SpecError: not four numbers.
    """
    boxes, labels = [], []
    for text in given:
        wanted = not text.strip().startswith("-")
        try:
            numbers = [float(part) for part in text.strip().removeprefix("-").split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != 4:
            raise SpecError(
                f"expected X0,Y0,X1,Y1 in pixels, as in 10,20,200,180, got {text!r}", subject="--box", step=Step.RUN
            )
        boxes.append(numbers)
        labels.append(wanted)
    return boxes, labels
