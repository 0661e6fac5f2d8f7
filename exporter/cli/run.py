"""``sam3x run`` and the ``--pipeline`` half of ``sam3x export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam3x.cli.console import hushed, reporting
from sam3x.errors import SpecError

if TYPE_CHECKING:
    from sam3x.runtime.manifest import PipelineManifest

Boxes = Annotated[
    list[str] | None,
    typer.Option("--box", metavar="X0,Y0,X1,Y1", help="An example in pixels; repeatable. With a minus in front: not wanted."),
]


def run(
    folder: Annotated[Path, typer.Argument(help="What `sam3x export --pipeline` wrote.", metavar="FOLDER")],
    picture: Annotated[Path, typer.Argument(help="A JPEG, PNG or WebP file.", metavar="PICTURE")],
    text: Annotated[list[str] | None, typer.Option("--text", metavar="WORDS", help="What to look for; repeatable.")] = None,
    box: Boxes = None,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Detections score above it.")] = 0.5,
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
            raise SpecError("run: nothing to look for. Give --text or --box.")
        for path in (output, json_file):
            if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
                raise SpecError(f"run: {path} cannot be written. Name a file in a folder that exists.")
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


def lint(
    checkpoint: Annotated[Path, typer.Argument(help="A .pt, .pth or .safetensors file.", metavar="CHECKPOINT")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every name, and the traceback of an error.")] = False,
) -> None:
    """Tell which image model a checkpoint holds and what is wrong with it; exit status 1 if something is."""
    with reporting(verbose):
        with hushed(verbose):
            from sam3x.sources.lint import lint as look

            report = look(checkpoint)
        if as_json:
            typer.echo(report.model_dump_json(indent=2))
        else:
            from sam3x.cli import pipeline_views
            from sam3x.cli import views as cli_views

            cli_views.show(pipeline_views.lint_view(report, verbose=verbose))
        if not report.clean:
            raise typer.Exit(1)


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
            raise SpecError(f"run: --box: expected X0,Y0,X1,Y1 in pixels, as in 10,20,200,180, got {text!r}.")
        boxes.append(numbers)
        labels.append(wanted)
    return boxes, labels


_ENCODER_ALONE = ("interface", "inputs", "dac_dim", "tokens", "prompt_length", "feature_sizes", "mask_dtype")


def check_pipeline_options(
    target: str, options: dict[str, Any], *, fuse: bool = False, components: str | None = None, **others: Any
) -> None:
    """Refuse what says something about a fusion encoder alone, and what cannot be joined.

    Raises:
        SpecError: naming the options that have no meaning for a whole model.
    """
    if fuse:
        from sam3x.pipeline.fuse_spec import check_fuse

        check_fuse(target, None if components is None else components.split(","))
    if options.get("layout", "flat") != "flat":
        raise SpecError(
            f"step 1/4 spec: --layout {options['layout']} is for one model; a pipeline has six. Leave --layout out."
        )
    given = [name for name in _ENCODER_ALONE if name in options] + [name for name, value in others.items() if value]
    if given:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise SpecError(f"step 1/4 spec: {named} belong to a fusion encoder alone. Leave them out with --pipeline.")


def show_pipeline(manifest: PipelineManifest, folder: Path, *, as_json: bool, quiet: bool, verbose: bool) -> None:
    """The manifest as JSON, or the components as tables."""
    if as_json:
        typer.echo(manifest.model_dump_json(indent=2))
    elif not quiet:
        from sam3x.cli import pipeline_views
        from sam3x.cli import views as cli_views

        cli_views.show(pipeline_views.pipeline_view(manifest, folder, verbose=verbose))
