"""A server for one's own machine, with the headers that give a page threads."""

from __future__ import annotations

import socket
import sys
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
        host: a name, an address of IPv4 or IPv6, or 0.0.0.0 or :: for every address that this machine has.
        port: 0 takes a free one; ``url_of`` tells it.

    Raises:
        SpecError: it cannot listen there.
    """

    class Handler(_Handler):
        files = site.files

    class Server(_Server):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    try:
        return Server((host, port), Handler)
    except OSError as error:
        fact = f"nothing can be served at {host}:{port} ({error.strerror or error})"
        option = "--host" if isinstance(error, socket.gaierror) else "--port"
        raise SpecError(fact, remedy=f"Choose another {option}.", step=Step.WEB) from error
    except OverflowError as error:
        raise SpecError(f"a port is a number up to 65535, got {port}", step=Step.WEB) from error


def url_of(server: ThreadingHTTPServer, host: str) -> str:
    """The address of a server at ``host`` that a browser on this machine opens; as localhost it may have threads."""
    name = "localhost" if host in _EVERY else f"[{host}]" if ":" in host else host
    return f"http://{name}:{server.server_port}/"


_EVERY = ("", "0.0.0.0", "::")


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away, as each does that is reloaded while it loads."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


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
