"""A server for one's own machine, with the headers that give a page threads."""

from __future__ import annotations

from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sam3x.errors import SpecError, Step
from sam3x.web.site import Site

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked again each time, answered with 304 where nothing changed
}
"""The first two isolate the page from other origins, without which browsers give it no memory that threads share."""

_NOTHING = str(Path(__file__) / "nothing")


def server_of(site: Site, host: str, port: int) -> ThreadingHTTPServer:
    """A server of the files of ``site`` and of nothing else, bound and not yet running.

    Args:
        port: 0 takes a free one; ``server_port`` tells it.

    Raises:
        SpecError: it cannot listen there.
    """

    class Handler(_Handler):
        files = site.files

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        fact = f"nothing can be served at {host}:{port} ({error.strerror or error})"
        raise SpecError(fact, remedy="Choose another --port.", step=Step.WEB) from error
    except OverflowError as error:
        raise SpecError(f"a port is a number up to 65535, got {port}", step=Step.WEB) from error


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: Any
    extensions_map = {  # noqa: RUF012 - the base class has it as a dict
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".json": "application/json",
        ".wasm": "application/wasm",
        "": "application/octet-stream",
    }

    def translate_path(self, path: str) -> str:
        name = unquote(urlsplit(path).path).lstrip("/")
        return str(self.files.get(name or "index.html", _NOTHING))

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""
