"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sam3x.errors import SpecError, Step


def named_path(value: str | Path) -> Path:
    """A path that is written to; an empty name, as of a variable that is not set, would be the current folder."""
    if not str(value).strip():
        raise typer.BadParameter("it is empty; the current folder is '.'")
    return Path(value)


def check_page(page: Path | None, option: str, step: Step) -> None:
    """Refuse a page that cannot be written, before the work is done.

    Raises:
        SpecError: it is a folder, or in none.
    """
    if page is not None and (page.is_dir() or not page.absolute().parent.is_dir()):
        remedy = "Name a file in a folder that exists."
        raise SpecError(f"{page} cannot be written", subject=option, remedy=remedy, step=step)


def parsed_providers(given: list[str] | None) -> list[str | tuple[str, dict[str, str]]]:
    """``cuda:device_id=1,arena_extend_strategy=kSameAsRequested`` → a name with its options; ``cuda`` → the name.

    Raises:
        SpecError: an option without a value.
    """
    found: list[str | tuple[str, dict[str, str]]] = []
    for text in given or ():
        name, colon, rest = text.partition(":")
        options = dict(item.partition("=")[::2] for item in rest.split(",") if item)
        if colon and (not options or not all(options.values())):
            raise SpecError(f"expected NAME:KEY=VALUE,KEY=VALUE, got {text!r}", subject="--provider", step=Step.LOAD)
        found.append((name, options) if colon else name)
    return found


Folder = Annotated[Path, typer.Argument(help="An exported folder.", metavar="FOLDER")]
Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", help="SAM3 or EfficientSAM3 .pt, .pth, .ckpt or .safetensors.")
]
WeightsKey = Annotated[
    str | None,
    typer.Option("--weights-key", metavar="KEY", help="Which weights of a checkpoint that has several, as in ema."),
]
Module = Annotated[
    str | None,
    typer.Option("--module", metavar="PKG.MOD:FACTORY", help="A callable that returns the encoder, or the encoder itself."),
]
Demo = Annotated[bool, typer.Option("--demo", help="The small trained model that sam3x brings, with its vocabulary.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print more, and the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; progress goes to stderr.")]
