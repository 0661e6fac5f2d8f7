"""``sam3x compatibility --runtimes``: each form of ``--for``, in each precision, in the runtimes that run here.

``python -m sam3x.bench.runtimes NAME FOLDER`` prints a line of JSON: one file in one runtime, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sam3x.artifact.memory import peak_memory
from sam3x.bench.tools import TOOLS, Tensors, distance, in_node, missing, node_environment, package_version
from sam3x.targets.onnx.target import FORMS, OnnxTarget

RUNTIMES = {"ONNX Runtime, CPU": "quantize_dynamic", "OpenVINO, CPU": "OpenVINO", "onnxruntime-web, WASM": "onnxruntime-web"}
"""Runtime → the tool of ``TOOLS`` that comes in the same package."""

PRECISIONS = ("fp32", "fp16", "int8")
TOKENS, THREADS, RUNS = 1296, 2, 4
_SECONDS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One file in one runtime: distance from eager float32, of the largest value; fastest run; peak of the process, bytes."""

    off: float
    seconds: float
    peak: int


Found = Mapping[tuple[str, str, str], "Measured | str"]
"""(precision, form, runtime) → figures, or why there are none. A form is named by the runtimes that take it."""


def forms() -> dict[str, str]:
    """Name of a form, its runtimes one after the other → one of them."""
    alike: dict[tuple[str, str], list[str]] = {}
    for runtime, form in FORMS.items():
        alike.setdefault(form, []).append(runtime)
    return {", ".join(names): names[0] for names in alike.values()}


def runtimes(tell: Callable[[str], None] = lambda _: None, precisions: Sequence[str] = PRECISIONS) -> Found:
    """Export a fusion encoder of SAM3's widths in every form and run it everywhere."""
    found: dict[tuple[str, str, str], Measured | str] = {}
    with tempfile.TemporaryDirectory() as name:
        for precision in precisions:
            for form, runtime in forms().items():
                tell(f"{precision} for {form}")
                folder = Path(name, f"{precision}-{runtime}")
                write_file(folder, runtime, precision)
                for other, tool in RUNTIMES.items():
                    absent = missing(TOOLS[tool])
                    found[precision, form, other] = f"not tried: {absent}" if absent else _apart(other, folder)
    return found


def write_file(folder: Path, runtime: str, precision: str) -> None:
    """An export of two layers, inputs of one picture in the branch that SAM3 runs, and eager's output."""
    from sam3x import api
    from sam3x.capture.samples import Sizes, make_inputs
    from sam3x.fusion.config import FusionConfig
    from sam3x.fusion.encoder import FusionEncoder
    from sam3x.sources.encoder import build_encoder, draw_weights
    from sam3x.spec import make_spec

    config = FusionConfig(d_model=256, num_heads=8, dim_feedforward=2048, num_layers=2)
    encoder = build_encoder(config).eval()
    draw_weights(encoder, seed=3)
    options: dict[str, Any] = {"dac": False, "pre_norm": True, "verify": "off"}
    artifact = api.export(encoder, output=folder, runtime=runtime, precision=precision, **options)
    spec, sizes = make_spec(**artifact.manifest.spec), Sizes(batch=1, tokens=TOKENS, prompt_length=32)
    given = make_inputs(artifact.manifest.input_names, spec, config.d_model, sizes, 1)
    wanted = FusionEncoder(encoder, spec).eager(given)
    for kind, tensors in (("inputs", given), ("outputs", wanted)):
        np.savez(folder / f"{kind}.npz", **{name: value.numpy() for name, value in tensors.items()})  # type: ignore[arg-type]


def _apart(runtime: str, folder: Path) -> Measured | str:
    command = [sys.executable, "-m", "sam3x.bench.runtimes", runtime, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=node_environment())
    except subprocess.TimeoutExpired:
        return f"it took more than {_SECONDS} s"
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return f"its process ended with {done.returncode}"
    return str(lines[-1]["error"]) if "error" in lines[-1] else Measured(**lines[-1])


def measure(runtime: str, folder: Path, providers: Any = None) -> Measured:
    """Run a file in this process; raises whatever the runtime does.

    Args:
        runtime: one of ``RUNTIMES``. providers: of ONNX Runtime, in place of the CPU.
    """
    path = folder / "fusion_encoder.onnx"
    given, wanted = (dict(np.load(folder / f"{kind}.npz")) for kind in ("inputs", "outputs"))
    if runtime.startswith("onnxruntime-web"):
        found, figures = in_node(path, [given] * RUNS)
        return Measured(off=_off(found[-1], wanted), seconds=min(figures["seconds"]), peak=figures["peak"])
    wished = "openvino" if runtime.startswith("OpenVINO") else providers
    settings = OnnxTarget().session_settings(threads=THREADS, providers=wished)
    runner, seconds = OnnxTarget().load_runner(path, **settings), []
    for _ in range(RUNS):
        started = time.perf_counter()
        outputs = runner.run(given)
        seconds.append(time.perf_counter() - started)
    return Measured(off=_off(outputs, wanted), seconds=min(seconds), peak=peak_memory())


def _off(found: Tensors, wanted: Tensors) -> float:
    return max(distance(found[name], value) for name, value in wanted.items())


def markdown(found: Found) -> str:
    """The page ``docs/runtimes.md``."""
    columns = list(forms())
    versions = ", ".join(f"{name} {package_version(TOOLS[tool]) or ''}".rstrip() for name, tool in RUNTIMES.items())
    lines = [
        "# Which form for which runtime",
        "",
        "Made by `sam3x compatibility --runtimes -o docs/runtimes.md`: two layers of SAM3's fusion encoder, random weights,",
        f"one picture of {TOKENS} tokens, prompt 32, {THREADS} threads (WebAssembly: one). A cell is the distance from eager",
        f"float32, of its largest value, the fastest of {RUNS} runs, and the peak memory of the process. {versions}.",
        "",
        "| `--for` | attention | branches | tiles in loops |",
        "|---|---|---|---|",
        *(f"| {name} | {form[0]} | {form[1]} | {'yes' if name == 'cpu' else ''} |" for name, form in FORMS.items()),
        "",
        "CUDA, TensorRT, DirectML, WebGPU and Core ML have not been run: `pytest -m long tests/bench/test_runtimes.py` does",
        "on a machine whose ONNX Runtime has the provider. Their forms follow from what each has kernels for: ONNX Runtime's",
        "own attention for CUDA, DirectML and WebGPU, plain products that TensorRT, OpenVINO and Core ML fuse themselves, and",
        "no loops or conditionals, which WebGPU and Core ML leave to the CPU.",
    ]
    notes: dict[str, list[str]] = {}
    for precision in dict.fromkeys(key[0] for key in found):
        lines += ["", f"## {precision}", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for row in RUNTIMES:
            cells = []
            for column in columns:
                item = found[precision, column, row]
                if isinstance(item, str):
                    notes.setdefault(" ".join(item.split())[:200], []).append(f"{row}, {precision}, {column}")
                    cells.append("no")
                else:
                    cells.append(f"{item.off:.0e}, {item.seconds * 1000:.0f} ms, {item.peak / 2**20:.0f} MB")
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    why = [f"- {'; '.join(where)}: {reason}" for reason, where in notes.items()]
    return "\n".join([*lines, *(["", "## Why not", "", *why] if why else []), ""])


def _main(runtime: str, folder: str) -> None:
    try:
        line: dict[str, Any] = dataclasses.asdict(measure(runtime, Path(folder)))
    except Exception as error:
        line = {"error": f"{type(error).__name__}: {error}"}
    print(f"\n{json.dumps(line)}", flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
