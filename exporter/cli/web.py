"""``sam3x web``: the page that runs a pipeline in a browser, written and served."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sam3x.cli.console import reporting
from sam3x.cli.options import named_path
from sam3x.errors import SpecError, Step

if TYPE_CHECKING:
    from sam3x.web.site import Site


def web(
    folder: Annotated[Path, typer.Argument(help="What `sam3x export --pipeline` wrote, to ONNX.", metavar="FOLDER")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", parser=named_path, metavar="DIR", help="Write the page and the files it runs there."),
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the page, with the headers that give it threads.")] = False,
    host: Annotated[str, typer.Option("--host", metavar="NAME", help="Where --serve listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, metavar="N", help="Where --serve listens; 0 takes a free one.")] = 8000,
    node_modules: Annotated[
        Path | None,
        typer.Option(
            "--node-modules",
            metavar="DIR",
            help="Where the two npm packages lie. Default: node_modules here or above, else npm gets them.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the traceback of an error.")] = False,
) -> None:
    """Make a page that runs a pipeline in a browser: picture and words in, masks out. Needs no torch."""
    with reporting(verbose):
        if output is None and not serve:
            raise SpecError("there is nothing to do", remedy="Give -o DIR, --serve or both.", step=Step.WEB)
        from sam3x.web.site import opened_site, write_site

        with opened_site(folder, node_modules) as site:
            if site.too_large is not None:
                typer.secho(f"sam3x: {site.too_large}", err=True, fg="yellow")
            if output is not None:
                write_site(site, output)
                _say(f"{len(site.files)} files in {output}, for any server; here: sam3x web {output} --serve", quiet)
            if serve:
                _serve(site, host, port, quiet)


def _serve(site: Site, host: str, port: int, quiet: bool) -> None:
    """Serve until Ctrl-C, which is how it ends."""
    from sam3x.web.serve import server_of, url_of

    with server_of(site, host, port) as server, contextlib.suppress(KeyboardInterrupt):
        _say(f"{url_of(server, host)} (Ctrl-C ends it)", quiet)
        server.serve_forever()


def _say(words: str, quiet: bool) -> None:
    if not quiet:
        typer.echo(words)
