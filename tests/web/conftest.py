"""A page in a real browser, over the small pipeline, and what the page takes from npm."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sam3x.web.packages import PACKAGES
from sam3x.web.serve import server_of
from sam3x.web.site import Site, opened_site
from support.browser import SECONDS, Browsed, Served
from support.npm import lacking_npm

BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


@pytest.fixture(scope="session")
def fake_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``node_modules`` with every file that the page takes, each a few bytes."""
    folder = tmp_path_factory.mktemp("fake") / "node_modules"
    for package in PACKAGES:
        for name in package.files:
            (folder / package.name / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / package.name / name).write_text(f"// {name}")
        (folder / package.name / "package.json").write_text(json.dumps({"version": package.version}))
    return folder


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages themselves, from npm's registry."""
    absent = lacking_npm()
    if absent is not None:
        pytest.skip(absent)
    folder = tmp_path_factory.mktemp("npm")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *map(str, PACKAGES)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "node_modules"


@pytest.fixture(scope="session")
def browser_path() -> str:
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium, or put Chrome on the PATH")
    pytest.importorskip("playwright", reason='pip install "sam3x[tools]"')
    return found


@pytest.fixture(scope="session")
def serving() -> Callable[[Site], Any]:
    """Serve a site while a block runs; the names that are asked for are kept."""

    @contextmanager
    def served(site: Site) -> Iterator[Served]:
        files = dict(site.files)
        server: ThreadingHTTPServer = server_of(replace(site, files=files), "127.0.0.1", 0)
        found = Served(url="http://{}:{}/".format(*server.server_address), files=files)
        handler: Any = server.RequestHandlerClass
        handler.log_request = lambda self, *_: found.asked.append(self.path.lstrip("/"))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            server.server_close()

    return served


@pytest.fixture(scope="module")
def site(tiny_pipeline: Path, node_modules: Path) -> Iterator[Site]:
    with opened_site(tiny_pipeline, node_modules) as site:
        yield site


@pytest.fixture(scope="session")
def playwright(browser_path: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright


@contextmanager
def browsing(playwright: Any, browser_path: str, *arguments: str) -> Iterator[Callable[..., Browsed]]:
    """Give what opens an address in a browser that has seen nothing yet; an error of its scripts is the test's failure."""
    browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", *arguments])
    errors: list[str] = []

    def opened(url: str, **options: Any) -> Browsed:
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(SECONDS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return Browsed(page)

    yield opened
    browser.close()
    assert errors == []


@pytest.fixture
def browse(playwright: Any, browser_path: str) -> Iterator[Callable[..., Browsed]]:
    with browsing(playwright, browser_path) as opened:
        yield opened


@pytest.fixture
def gpu_browse(playwright: Any, browser_path: str) -> Iterator[Callable[..., Browsed]]:
    """With WebGPU by SwiftShader, Chromium's own Vulkan on the CPU."""
    options = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
    with browsing(playwright, browser_path, *options) as opened:
        yield opened
