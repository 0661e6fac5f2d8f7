"""Triton Inference Server as far as a package index has it: the wheel of nvidia-pytriton holds one with the Python backend."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HERE = "localhost"

STAND_IN = '''
"""What the ONNX Runtime backend does, in the Python backend."""

from pathlib import Path

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(path), options)

    def execute(self, requests):
        responses = []
        for request in requests:
            given = {item.name(): item.as_numpy() for item in request.inputs()}
            names = [item.name for item in self.session.get_outputs()]
            outputs = [pb_utils.Tensor(*pair) for pair in zip(names, self.session.run(names, given))]
            responses.append(pb_utils.InferenceResponse(output_tensors=outputs))
        return responses
'''


@dataclass(frozen=True)
class Server:
    """Ports of a server that runs on this machine."""

    http: int
    grpc: int
    metrics: int

    def told(self) -> str:
        """Its metrics, a line each."""
        with urllib.request.urlopen(f"http://{HERE}:{self.metrics}/metrics") as answer:
            return answer.read().decode()


def model_config() -> Any:
    """The module of ``model_config.proto`` as NVIDIA publishes it, without its package's ``__init__``."""
    path = next(item for item in files("tritonclient") or () if item.name == "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(path.locate()))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed(folder: Path) -> Path:
    """``tritonserver`` out of the wheel, and numpy 1 in ``packages``; skips the test where an index or a system has none."""
    pip = [sys.executable, "-m", "pip"]
    for command in (
        [*pip, "download", "-q", "--no-deps", "-d", str(folder), "nvidia-pytriton>=0.7"],
        [*pip, "install", "-q", "--no-deps", "--target", str(folder / "packages"), "numpy<2"],  # what it was built for
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no {command[-1]}: {done.stderr.strip().splitlines()[-1]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    root = folder / "pytriton" / "tritonserver"
    stub = root / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}" / "triton_python_backend_stub"
    if not stub.exists():
        pytest.skip(f"its Python backend is not built for Python {sys.version_info[0]}.{sys.version_info[1]}")
    shutil.copy(stub, root / "backends" / "python")
    libraries = subprocess.run(["ldd", str(stub)], capture_output=True, text=True).stdout
    if "libpython" in libraries and "not found" in libraries:
        pytest.skip("its Python backend needs this system's libpython")
    for file in (root / "bin" / "tritonserver", root / "backends" / "python" / stub.name):
        file.chmod(0o755)
    return root


def with_stand_ins(repository: Path, copy: Path, packages: Path) -> Path:
    """A copy of a model repository whose ONNX models run in the Python backend, as the wheel has no other.

    The server's Python looks at what its system has installed alone, so the models are told where the tests' packages are.
    """
    tree = copy.with_name("tree")
    package = tree / "sam3x"
    package.mkdir(parents=True)
    for item in [*(ROOT / "exporter").iterdir(), ROOT / "passes", ROOT / "targets"]:
        (package / item.name).symlink_to(item)
    paths = [str(tree), str(packages), *(path for path in sys.path if path.endswith("-packages"))]
    shutil.copytree(repository, copy)
    for model in copy.glob("*/1/model.onnx"):
        config = model.parents[1] / "config.pbtxt"
        text = config.read_text().replace('backend: "onnxruntime"', 'backend: "python"')
        config.write_text(f"{text}instance_group {{ count: 1, kind: KIND_CPU }}\n")
        (model.parent / "model.py").write_text(STAND_IN)
    for code in copy.glob("*/1/model.py"):
        code.write_text(f"import sys\n\nsys.path[:0] = {paths!r}\n{code.read_text()}")
    return copy


@contextlib.contextmanager
def serving(root: Path, repository: Path, folder: Path, *options: str) -> Iterator[Server]:
    """A server of ``repository`` that is ready; ``folder`` gets its log."""
    env = {**os.environ, "LD_LIBRARY_PATH": str(root.parents[1] / "nvidia_pytriton.libs")}
    server = Server(*free_ports(3))
    command = [
        str(root / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={root / 'backends'}",
        f"--cache-directory={root / 'caches'}",
        f"--http-port={server.http}",
        f"--grpc-port={server.grpc}",
        f"--metrics-port={server.metrics}",
        *options,
    ]
    log = folder / "server.log"
    with log.open("w") as file:
        running = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        import tritonclient.http

        client, end = tritonclient.http.InferenceServerClient(f"{HERE}:{server.http}"), time.monotonic() + 120
        while True:
            assert running.poll() is None and time.monotonic() < end, log.read_text()[-6000:]
            with contextlib.suppress(OSError):
                if client.is_server_ready():
                    break
            time.sleep(0.2)
        client.close()
        yield server
    finally:
        running.terminate()
        running.wait(timeout=60)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind((HERE, 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports
