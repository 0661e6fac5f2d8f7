"""``sam3x web``: what is written and served, and what is refused."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import struct
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from sam3x.artifact.manifest import MANIFEST, read_manifest, sealed
from sam3x.errors import ArtifactError, Sam3xError, SpecError, TargetUnavailableError
from sam3x.runtime import Segmenter
from sam3x.web import site as site_module
from sam3x.web.serve import server_of, url_of
from sam3x.web.site import SITE, Site, opened_site, write_site
from support.command_line import run
from support.folders import altered


def test_a_site_is_the_page_and_the_files_it_runs_and_a_pipeline_itself(
    tiny_pipeline: Path, fake_modules: Path, tmp_path: Path
) -> None:
    done = run("web", tiny_pipeline, "-o", tmp_path / "site", "--node-modules", fake_modules)
    assert done.exit_code == 0, done.output
    written = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*") if path.is_file()}
    own = set(read_manifest(tiny_pipeline).files)
    assert written >= own | {"index.html", "page.js", "worker.js", "segmenter.mjs", "ort/ort.wasm.min.mjs", SITE, MANIFEST}
    facts = json.loads((tmp_path / "site" / SITE).read_text())
    assert facts["bytes"] == {name: (tiny_pipeline / name).stat().st_size for name in own}
    assert facts["words"] and facts["clicks"] and facts["too_large"] is None
    with Segmenter(tmp_path / "site") as segmenter:  # every hash is right
        assert segmenter.tokenizer("dog") and segmenter.clickable


def test_a_site_written_again_replaces_itself_and_leaves_what_is_the_users(
    tiny_pipeline: Path, fake_modules: Path, tmp_path: Path
) -> None:
    with opened_site(tiny_pipeline, fake_modules) as site:
        extra = {**site.files, "old.js": site.files["page.js"]}
        manifest = read_manifest(tiny_pipeline)
        older = tmp_path / "older.json"
        older.write_text(sealed(manifest.model_copy(update={"files": {**_hashes(extra), MANIFEST: ""}})))
        write_site(Site(files={**extra, MANIFEST: older}, too_large=None), tmp_path / "site")
        (tmp_path / "site" / "notes.txt").write_text("mine")
        write_site(site, tmp_path / "site")
        names = {path.name for path in (tmp_path / "site").iterdir()}
        assert "notes.txt" in names and "old.js" not in names


def _hashes(files: dict[str, Path]) -> dict[str, str]:
    from sam3x.artifact.files import sha256_of

    return {name: sha256_of(path) for name, path in files.items() if name != MANIFEST}


def test_a_page_of_the_users_is_not_overwritten(tiny_pipeline: Path, fake_modules: Path, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("my own page")
    with opened_site(tiny_pipeline, fake_modules) as site, pytest.raises(ArtifactError, match="no export of sam3x wrote it"):
        write_site(site, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


@pytest.fixture
def responses(tiny_pipeline: Path, fake_modules: Path, serving: Callable[..., Any]) -> Any:
    with opened_site(tiny_pipeline, fake_modules) as site, serving(site) as served:

        def ask(path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(served.url.removeprefix("http://").rstrip("/"))
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()

        yield ask


def test_everything_is_served_with_the_headers_that_isolate_a_page(responses: Any, tiny_pipeline: Path) -> None:
    for path, kind in {
        "/": "text/html; charset=utf-8",
        "/page.js": "text/javascript",
        "/ort/ort.wasm.min.mjs": "text/javascript",
        "/ort/ort-wasm-simd-threaded.wasm": "application/wasm",
        "/decoder.onnx": "application/octet-stream",
        "/site.json?again": "application/json",
    }.items():
        status, headers, _ = responses(path)
        assert (status, headers["content-type"]) == (200, kind)
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cross-origin-embedder-policy"] == "require-corp"
    status, headers, body = responses("/decoder.onnx")
    assert body == (tiny_pipeline / "decoder.onnx").read_bytes()
    again, _, body = responses("/decoder.onnx", **{"If-Modified-Since": headers["last-modified"]})
    assert (again, body) == (304, b"")


def test_nothing_else_is_served(responses: Any) -> None:
    for path in ("/nothing", "/../pyproject.toml", "/%2e%2e/pyproject.toml", "//etc/passwd", "/ort/", "/page.js/", "/ort"):
        status, headers, _ = responses(path)
        assert status == 404 and headers["cross-origin-embedder-policy"] == "require-corp"


@pytest.mark.parametrize(
    ("fields", "error", "fact"),
    [
        ({"target": "pte"}, SpecError, "was exported to 'pte'"),
        ({"tokenizer": None, "clicks": None}, ArtifactError, "has no tokenizer, so the page could ask nothing"),
    ],
)
def test_a_pipeline_that_the_page_cannot_ask_is_refused(
    fields: dict[str, Any], error: type[Sam3xError], fact: str, tiny_pipeline: Path, fake_modules: Path, tmp_path: Path
) -> None:
    folder = altered(tiny_pipeline, tmp_path / "out", **fields)
    with pytest.raises(error, match=fact), opened_site(folder, fake_modules):
        pass


def test_a_pipeline_without_words_is_asked_by_clicks(tiny_pipeline: Path, fake_modules: Path, tmp_path: Path) -> None:
    with opened_site(altered(tiny_pipeline, tmp_path / "out", tokenizer=None), fake_modules) as site:
        facts = json.loads(site.files[SITE].read_text())
    assert not facts["words"] and facts["clicks"]


@pytest.mark.parametrize(
    ("limit", "fact"),
    [("LARGEST_FILE", r"interactive_head.onnx has .* in one piece"), ("WASM_MEMORY", "more than the 4.3 GB")],
)
def test_what_is_too_large_for_a_tab_is_said(
    limit: str, fact: str, tiny_pipeline: Path, fake_modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_module, limit, 1 << 20)
    with opened_site(tiny_pipeline, fake_modules) as site:
        assert site.too_large is not None
        assert re.search(fact, site.too_large)
        assert json.loads(site.files[SITE].read_text())["too_large"] == site.too_large


def test_what_npm_cannot_bring_is_one_sentence_with_the_command(
    tiny_pipeline: Path, fake_modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetUnavailableError, match=r"nor npm to get it.*Install Node"), opened_site(tiny_pipeline):
        pass
    failing = tmp_path / "npm"
    failing.write_text("#!/bin/sh\necho 'npm error code E404' >&2\nexit 1\n")
    failing.chmod(0o755)
    with pytest.raises(TargetUnavailableError, match=r"E404.*npm install onnxruntime-web@"), opened_site(tiny_pipeline):
        pass
    with pytest.raises(TargetUnavailableError, match="holds no onnxruntime-web"), opened_site(tiny_pipeline, tmp_path):
        pass
    shutil.copytree(fake_modules, tmp_path / "node_modules")
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")  # as Node looks, in the folders above too
    with opened_site(tiny_pipeline) as site:
        assert site.files["ort/ort.wasm.min.mjs"].read_text() == "// dist/ort.wasm.min.mjs"
    (tmp_path / "node_modules" / "onnxruntime-web" / "dist" / "ort.wasm.min.mjs").unlink()
    fact = r"is onnxruntime-web 1\S+ and holds no dist/ort.wasm.min.mjs"
    with pytest.raises(TargetUnavailableError, match=fact), opened_site(tiny_pipeline):
        pass


def test_a_port_that_is_taken_is_told(tiny_pipeline: Path, fake_modules: Path) -> None:
    with opened_site(tiny_pipeline, fake_modules) as site, server_of(site, "127.0.0.1", 0) as server:
        with pytest.raises(SpecError, match="Choose another --port"):
            server_of(site, "127.0.0.1", server.server_port)
        with pytest.raises(SpecError, match="up to 65535"):
            server_of(site, "127.0.0.1", 70_000)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "localhost")])
def test_the_address_that_is_told_is_served_and_a_browser_may_go_away(
    host: str, shown: str, tiny_pipeline: Path, fake_modules: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    large = tmp_path / "large"
    large.write_bytes(bytes(1 << 24))
    with opened_site(tiny_pipeline, fake_modules) as site:
        server = server_of(replace(site, files={**site.files, "large": large}), host, 0)
    url = url_of(server, host)
    assert url == f"http://{shown}:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with socket.create_connection((urlsplit(url).hostname, server.server_port)) as leaving:
            leaving.sendall(b"GET /large HTTP/1.1\r\n\r\n")
            leaving.recv(10)
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, as a closed tab does
        with urllib.request.urlopen(f"{url}page.css") as answer:
            assert answer.status == 200
    finally:
        server.shutdown()
        server.server_close()  # waits for its threads
        thread.join()
    assert capfd.readouterr().err == ""


def test_a_host_that_is_none_and_a_folder_without_a_name_are_told(tiny_pipeline: Path, fake_modules: Path) -> None:
    with opened_site(tiny_pipeline, fake_modules) as site, pytest.raises(SpecError, match="Choose another --host"):
        server_of(site, "256.1.1.1", 0)
    done = run("web", tiny_pipeline, "-o", "")
    assert done.exit_code == 2 and "it is empty" in done.output


def test_there_must_be_something_to_do(tmp_path: Path) -> None:
    done = run("web", tmp_path)
    assert done.exit_code == 2 and "Give -o DIR, --serve or both." in done.output
    done = run("web", tmp_path, "--serve")
    assert done.exit_code == 2 and "manifest.json cannot be read" in done.output
