"""Export, verify, load, run and bench without the POSIX parts of Python's library, as on Windows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PREAMBLE = """
import builtins, os, shutil, sys
import psutil  # has a form for each system; ours here needs what is taken away below
from pathlib import Path

plain_import, plain_open = builtins.__import__, os.open

def without_posix(name, globals=None, *rest, **others):
    if name in ("resource", "fcntl", "pwd", "grp") and (globals or {}).get("__name__", "").startswith(("sam3x", "filelock")):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return plain_import(name, globals, *rest, **others)

def no_folders(path, flags, *rest, **others):
    if not isinstance(path, int) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return plain_open(path, flags, *rest, **others)

builtins.__import__, os.open = without_posix, no_folders
shutil._use_fd_functions = False  # rmtree opens folders where it may
for name in ("fork", "killpg", "sysconf", "getloadavg", "sched_getaffinity", "O_DIRECTORY", "geteuid"):
    delattr(os, name)
sys.path.insert(0, sys.argv[1])
from support.upstream import encoder_of
import sam3x
from sam3x import api
"""


def run(code: str, folder: Path) -> str:
    command = [sys.executable, "-W", "ignore", "-c", PREAMBLE + code, str(Path(__file__).parent), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_export_verify_load_and_run(tmp_path: Path) -> None:
    code = """
out = Path(sys.argv[2])
sizes = {"batch": 1, "pre_norm": True, "tokens": 16, "prompt_length": 4}
artifact = sam3x.export(encoder_of(1), output=out, **sizes)
sam3x.export(encoder_of(1), output=out, **sizes)  # over an earlier one
api.verify(out, encoder_of(1))
print(artifact.manifest.verified, sorted(os.listdir(out)))
"""
    assert run(code, tmp_path / "out").strip() == "True ['fusion_encoder.onnx', 'manifest.json']"


def test_one_export_at_a_time(tmp_path: Path) -> None:
    code = """
from sam3x.artifact.lock import locked
folder = Path(sys.argv[2])
with locked(folder):
    try:
        with locked(folder):
            print("twice")
    except BlockingIOError:
        print("held")
with locked(folder):
    print(os.listdir(folder))
"""
    assert run(code, tmp_path).splitlines()[0] == "held"
    assert list(tmp_path.iterdir()) == []


def test_every_module_is_imported(tmp_path: Path) -> None:
    code = """
import importlib, pkgutil
import sam3x.passes, sam3x.targets
for package in (sam3x, sam3x.passes, sam3x.targets):
    for item in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not item.name.endswith("__main__") and ".tensorrt.interpreter" not in item.name:  # needs the named device
            importlib.import_module(item.name)
print("all")
"""
    assert run(code, tmp_path).strip().endswith("all")


def test_bench(default_artifact: Path, tmp_path: Path) -> None:
    code = f"""
from typer.testing import CliRunner
from sam3x.cli.app import app
sizes = ["--tokens", "20", "--prompt-length", "4", "--repeat", "2", "--warmup", "1"]
result = CliRunner().invoke(app, ["bench", {str(default_artifact)!r}, *sizes])
print(result.exit_code, result.output[-1500:], result.exception)
"""
    assert run(code, tmp_path).startswith("0 ")
