"""What the page takes from npm: ONNX Runtime for browsers, and Hugging Face's tokenizers in JavaScript."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sam3x.errors import Step, TargetUnavailableError


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """An npm package, the version that is asked for, and the files of it that the page loads."""

    name: str
    version: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


_WASM = ("ort-wasm-simd-threaded", "ort-wasm-simd-threaded.asyncify")  # the second one has WebGPU
ORT = Package(
    name="onnxruntime-web",
    version="1.30.0",
    files=(
        *(f"dist/ort.{kind}.min.mjs" for kind in ("wasm", "webgpu")),
        *(f"dist/{name}.{kind}" for name in _WASM for kind in ("mjs", "wasm")),
    ),
)
TOKENIZERS = Package(name="@huggingface/tokenizers", version="0.2.0", files=("dist/tokenizers.min.mjs",))
PACKAGES = (ORT, TOKENIZERS)

_INSTALL = f"Run npm install {' '.join(map(str, PACKAGES))} in this folder, or name another with --node-modules."


def package_folder(package: Package, node_modules: Path | None, scratch: Path) -> Path:
    """The folder of ``package``, every file of it there.

    Args:
        node_modules: where it lies. None: in the ``node_modules`` of the current folder or one above it, as Node looks;
            where none has it, ``npm pack`` gets it.
        scratch: an empty folder for what is fetched.

    Raises:
        TargetUnavailableError: it cannot be had, with the command that gets it.
    """
    here = Path.cwd()
    places = [node_modules] if node_modules is not None else [path / "node_modules" for path in (here, *here.parents)]
    found = next((path / package.name for path in places if (path / package.name / "package.json").is_file()), None)
    if found is None and node_modules is not None:
        raise TargetUnavailableError(f"{node_modules} holds no {package.name}", remedy=_INSTALL, step=Step.WEB)
    folder = found or _fetched(package, scratch)
    missing = [name for name in package.files if not (folder / name).is_file()]
    if missing:
        fact = f"{folder} is {package.name} {version_of(folder)} and holds no {missing[0]}"
        raise TargetUnavailableError(fact, remedy=_INSTALL, step=Step.WEB)
    return folder


def version_of(folder: Path) -> str:
    """The version that a package's own file tells."""
    try:
        return str(json.loads((folder / "package.json").read_bytes())["version"])
    except (OSError, ValueError, LookupError, TypeError):
        return "of an unknown version"


def _fetched(package: Package, scratch: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        fact = f"the page needs {package}, and there is neither a node_modules that holds it nor npm to get it"
        raise TargetUnavailableError(fact, remedy="Install Node.js, or give --node-modules.", step=Step.WEB)
    command = [npm, "pack", "--prefer-offline", "--silent", "--pack-destination", str(scratch), str(package)]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
    archive = next(iter(scratch.glob("*.tgz")), None)
    if done.returncode or archive is None:
        words = next(iter((done.stderr or done.stdout).strip().splitlines()), "it gave no file")
        raise TargetUnavailableError(f"npm cannot get {package} ({words})", remedy=_INSTALL, step=Step.WEB)
    with tarfile.open(archive) as stream:
        for member, name in _wanted(stream, package):
            source = stream.extractfile(member)
            assert source is not None
            (scratch / name).parent.mkdir(exist_ok=True)
            with (scratch / name).open("wb") as target:
                shutil.copyfileobj(source, target)
    archive.unlink()
    return scratch


def _wanted(stream: tarfile.TarFile, package: Package) -> Iterator[tuple[tarfile.TarInfo, str]]:
    names = {f"package/{name}": name for name in (*package.files, "package.json")}
    return ((member, names[member.name]) for member in stream if member.isfile() and member.name in names)
