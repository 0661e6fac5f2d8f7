"""One contender of ``sam3x bench`` in a process of its own: ``python -m sam3x.bench.worker``.

The first line on stdin is the job; each further line is a command. Every line on stdout is one JSON event:
``imported``, ``loaded``, ``first_output``, ``ready``, then one for each command, or ``error``. An artifact runs without torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sam3x.artifact.memory import memory_now, peak_memory
from sam3x.bench.limits import limit_executorch, limit_onnxruntime
from sam3x.bench.pipeline_contenders import (
    ClickContender,
    EagerClickContender,
    EagerPipelineContender,
    PipelineContender,
)

if TYPE_CHECKING:
    import numpy as np

    Arrays = dict[str, np.ndarray]
    Run = Callable[[Arrays], np.ndarray]
    Tensors = Sequence[tuple[str, str, tuple[int, ...]]]

MEGABYTE = 1e6


# ---- memory


def restart_peak() -> bool:
    """Let the peak count from here (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


# ---- inputs


def make_inputs(tensors: Tensors, flags: dict[str, bool], seed: int) -> Arrays:
    """Arrays that depend on a tensor's name and shape alone, so that every contender gets the same ones.

    Floats are normal; padding masks hide the last quarter, other masks a few places, never a whole row.
    """
    import numpy as np

    arrays: Arrays = {}
    for name, dtype, shape in tensors:
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if name in flags:
            arrays[name] = np.full(shape, flags[name], dtype=bool)
        elif "padding_mask" in name:
            size = shape[-1]
            arrays[name] = np.broadcast_to(np.arange(size) >= size - size // 4, shape).copy()
        elif "mask" in name:
            hidden = generator.random(shape, dtype=np.float32) < 0.3
            hidden[..., 0] = False
            arrays[name] = hidden if dtype == "bool" else np.where(hidden, -np.inf, 0).astype(dtype)
        else:
            arrays[name] = generator.standard_normal(shape, dtype=np.float32).astype(dtype, copy=False)
    return arrays


def baseline_tensors(sizes: dict[str, int], d_model: int) -> Tensors:
    """The inputs of every baseline."""
    batch, tokens, length = sizes["batch"], sizes["tokens"], sizes["prompt_length"]
    return (
        ("tgt", "float32", (batch, tokens, d_model)),
        ("memory", "float32", (batch, length, d_model)),
        ("memory_key_padding_mask", "bool", (batch, length)),
        ("query_pos", "float32", (batch, tokens, d_model)),
    )


# ---- contenders: each imports, then loads, then makes its inputs


class ArtifactContender:
    """An exported folder through ``sam3x.load``."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job

    def imports(self) -> None:
        import numpy  # noqa: F401

        import sam3x.artifact.artifact  # noqa: F401
        from sam3x.artifact.manifest import MANIFEST

        target = json.loads((Path(self.job["path"]) / MANIFEST).read_text()).get("target")
        if target == "onnx":
            limit_onnxruntime(self.job["threads"])
        elif target == "pte":
            limit_executorch(self.job["threads"])

    def load(self) -> Run:
        from sam3x.artifact.artifact import load

        self.artifact = artifact = load(self.job["path"])
        check_branch(artifact.manifest.spec, self.job["flags"])
        artifact._runner  # noqa: B018 - opens the session
        first = artifact.manifest.output_names[0]
        return lambda arrays: artifact.run(arrays)[first]

    def inputs(self) -> Arrays:
        manifest = self.artifact.manifest
        sizes = self.job["sizes"]
        tensors = [
            (item.name, item.dtype, tuple(size if isinstance(size, int) else sizes[size] for size in item.shape))
            for item in manifest.inputs
        ]
        if manifest.interface == "feature_maps":
            tokens = sum(height * width for height, width in manifest.spec["feature_sizes"])
            if tokens != sizes["tokens"]:
                raise RuntimeError(f"its feature maps have {tokens} tokens, not {sizes['tokens']}")
        return make_inputs(tensors, self.job["flags"], self.job["seed"])

    def metadata(self) -> dict[str, Any]:
        return {"weights_sha256": self.artifact.manifest.weights_sha256}

    def profile(self, arrays: Arrays) -> list[dict[str, Any]]:
        """Time by operator where the runner can tell it, as those of ONNX and ExecuTorch can."""
        tell = getattr(self.artifact._runner, "profile", None)
        return tell(arrays) if tell is not None else []


class TorchContender:
    """``eager`` and ``inductor``; ``export`` writes the file that ``onnx-default`` and ``openvino`` run."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job

    def imports(self) -> None:
        import contextlib

        import torch

        import sam3x.bench.baselines  # noqa: F401

        with contextlib.suppress(Exception):  # without it, loading says what is missing
            import sam3.model.encoder  # noqa: F401

        torch.set_num_threads(self.job["threads"])
        torch.set_num_interop_threads(1)

    def load(self) -> Run:
        import torch

        from sam3x.bench.baselines import StaticEncoder, parameter_bytes, source_of, to_tensors

        self.source = source_of(self.job["checkpoint"], self.job["module"], self.job["seed"])
        self.encoder = StaticEncoder(self.source.module, **self.job["flags"])
        self.weight_bytes = parameter_bytes(self.encoder)
        call = torch.compile(self.encoder) if self.job["kind"] == "inductor" else self.encoder

        def run(arrays: Arrays) -> np.ndarray:
            with torch.inference_mode():
                return call(*to_tensors(arrays)).numpy()

        return run

    def inputs(self) -> Arrays:
        return make_inputs(baseline_tensors(self.job["sizes"], self.encoder.d_model), {}, self.job["seed"])

    def metadata(self) -> dict[str, Any]:
        return {
            "weights_sha256": self.source.weights_sha256,
            "weight_bytes": self.weight_bytes,
            "d_model": self.encoder.d_model,
        }

    def export(self) -> dict[str, Any]:
        from sam3x.bench.baselines import export_default

        self.load()
        seconds = export_default(self.encoder, self.inputs(), Path(self.job["path"]))
        return {"export_seconds": seconds, **self.metadata()}


class OnnxContender:
    """A plain .onnx file in ONNX Runtime, with the session settings of an artifact."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job

    def imports(self) -> None:
        limit_onnxruntime(self.job["threads"])

    def load(self) -> Run:
        from sam3x.targets.registry import get_target

        runner: Any = get_target("onnx").load_runner(Path(self.job["path"]))
        self.runner = runner
        return lambda arrays: runner.run(arrays)["output"]

    def inputs(self) -> Arrays:
        return make_inputs(baseline_tensors(self.job["sizes"], self.job["d_model"]), {}, self.job["seed"])

    def metadata(self) -> dict[str, Any]:
        return {}

    def profile(self, arrays: Arrays) -> list[dict[str, Any]]:
        """Time by operator in ONNX Runtime."""
        return self.runner.profile(arrays)


class OpenvinoContender(OnnxContender):
    """The same file in OpenVINO."""

    def profile(self, arrays: Arrays) -> list[dict[str, Any]]:
        """Nothing: its operators are not ONNX Runtime's."""
        return []

    def imports(self) -> None:
        import openvino  # noqa: F401

    def load(self) -> Run:
        import openvino

        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": self.job["threads"], "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(core.read_model(self.job["path"]), "CPU", settings)
        return lambda arrays: compiled(arrays)[0]


CONTENDERS: dict[str, Any] = {
    "artifact": ArtifactContender,
    "eager": TorchContender,
    "inductor": TorchContender,
    "export": TorchContender,
    "onnx-default": OnnxContender,
    "openvino": OpenvinoContender,
    "pipeline": PipelineContender,
    "pipeline-eager": EagerPipelineContender,
    "click": ClickContender,
    "click-eager": EagerClickContender,
}


def check_branch(spec: dict[str, Any], flags: dict[str, bool]) -> None:
    """An artifact with a flag fixed the other way would answer another question."""
    for name, value in flags.items():
        if isinstance(spec.get(name), bool) and spec[name] is not value:
            words = {True: "on", False: "off"}
            raise RuntimeError(f"it was exported with {name} {words[spec[name]]}, and {name}={words[value]} was asked for")


# ---- the conversation


def _claim_stdout() -> TextIO:
    """The pipe to the parent, for events alone; whatever else is printed, by native code too, goes to stderr."""
    sys.stdout.flush()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def _reason(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    named = type(error).__module__.partition(".")[0] == "sam3x" or type(error) is RuntimeError
    return text if named and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def _timed(run: Run, arrays: Arrays) -> dict[str, float]:
    before, started = time.process_time(), time.perf_counter()
    run(arrays)
    seconds, cpu = time.perf_counter() - started, time.process_time() - before
    return {"seconds": seconds, "cpu_seconds": cpu}


def serve(commands: TextIO, tell: Callable[..., None]) -> None:
    """One job from its first line to ``quit`` or the end of the input."""
    step = "start"
    try:
        job = json.loads(commands.readline())
        contender = CONTENDERS[job["kind"]](job)
        step = "import"
        contender.imports()
        imported = memory_now() / MEGABYTE
        tell("imported")
        if job["kind"] == "export":
            step = "export"
            tell("ready", **contender.export())
            return
        step = "load"
        run: Run = contender.load()
        step = "inputs"
        arrays = contender.inputs()
        loaded, peak_load = memory_now() / MEGABYTE, peak_memory() / MEGABYTE
        restarted = restart_peak()
        tell("loaded")
        step = "first run"
        output = run(arrays)
        tell("first_output")
        peak_first = peak_memory() / MEGABYTE
        if job.get("output"):
            import numpy

            numpy.save(job["output"], output)
        del output
        tell("ready", **contender.metadata())
        for line in commands:
            command = json.loads(line)["do"]
            if command == "quit":
                break
            step = "run"
            tell("ran", **_timed(run, arrays))
        at_start = {"imported": imported, "loaded": loaded, "peak_load": peak_load, "peak_first": peak_first}
        peak_run = peak_memory() / MEGABYTE
        step = "profile"
        profile = contender.profile(arrays) if job.get("profile") and hasattr(contender, "profile") else []
        known = {**at_start, "peak_run": peak_run, "peak": max(peak_load, peak_run), "restarted": restarted}
        tell("done", memory=known, profile=profile)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        tell("error", step=step, message=_reason(error))


def main() -> None:
    """Talk over stdin and stdout."""
    channel = _claim_stdout()

    def tell(event: str, **fields: Any) -> None:
        channel.write(json.dumps({"event": event, **fields}) + "\n")
        channel.flush()

    serve(sys.stdin, tell)


if __name__ == "__main__":
    main()
