"""``sam3x demo``: the small trained model, exported, run without torch, and a picture of what it found."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from sam3x.cli.console import reporting
from sam3x.cli.options import Quiet, Verbose, named_path
from sam3x.errors import SpecError, Step, TargetUnavailableError

PIPELINE, PICTURE, SCENE = "demo", "demo.png", "demo-scene.png"
PACKAGES = ("torch", "torchvision", "transformers", "safetensors", "onnx", "onnxscript", "onnxruntime", "tokenizers", "PIL")


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", parser=named_path, metavar="FOLDER", help="Folder to write.")
    ] = Path("out"),
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Export the small trained model that sam3x brings, run it without torch, and draw what it found.

    Writes FOLDER/demo (the exported pipeline), FOLDER/demo-scene.png (the picture) and FOLDER/demo.png (the answers).
    """
    with reporting(verbose):
        _check(output)
        folder = output / PIPELINE
        flags = [flag for flag, given in (("--quiet", quiet), ("--verbose", verbose)) if given]
        command = [sys.executable, "-m", "sam3x", "export", "--pipeline", "--demo", "-o", str(folder), *flags]
        code = subprocess.run(command).returncode  # a process of its own: this one runs the files and has no torch
        if code:
            raise typer.Exit(code)
        from sam3x.demo import show
        from sam3x.runtime.segmenter import Segmenter

        picture = show.scene()
        with Segmenter(folder) as segmenter:
            found = show.answers(segmenter, picture)
        from PIL import Image

        show.write(Image.fromarray(picture.pixels), output / SCENE)
        show.write(show.sheet(found), output / PICTURE)
        if not quiet:
            for asked, result in found:
                scores = ", ".join(f"{score:.2f}" for score in result.scores)
                typer.echo(f"{asked}: {f'{len(result)} found, scores {scores}' if len(result) else 'nothing found'}")
            typer.echo(f"The answers are drawn in {output / PICTURE}. Ask your own, without torch:")
            typer.echo(f'  sam3x run {folder} {output / SCENE} --text "green triangle" -o {output / "green.png"}')


def _check(output: Path) -> None:
    """Refuse before the export, which takes a while, what cannot end well.

    Raises:
        TargetUnavailableError: packages are missing.
        SpecError: the folder is none, or holds pictures that no demo wrote.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        remedy = 'Install it: pip install "sam3x[onnx,transformers,runtime]"'
        raise TargetUnavailableError(f"the demo needs {', '.join(missing)}", remedy=remedy, step=Step.RUN)
    above = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not above.is_dir():
        raise SpecError(f"{output} cannot be written ({above} is a file)", remedy="Choose another --output.", step=Step.RUN)
    taken = [output / name for name in (PICTURE, SCENE) if (output / name).exists()]
    if taken and not (output / PIPELINE / "manifest.json").exists():
        fact = f"{taken[0]} would be overwritten, and no demo wrote it"
        raise SpecError(fact, remedy="Move it, or choose another --output.", step=Step.RUN)
