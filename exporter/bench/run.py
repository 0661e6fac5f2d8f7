"""``sam3x bench``: contenders in processes of their own, timed in turn in one run, and what was measured as a report."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from sam3x.artifact.manifest import MANIFEST, is_pipeline, read_manifest
from sam3x.bench.process import ContenderError, Worker, workers_closed
from sam3x.bench.report import (
    BenchReport,
    BenchRequest,
    Case,
    Machine,
    Memory,
    Result,
    branch_text,
    command_of,
    contender_names,
    timing_of,
    with_ratios,
)
from sam3x.errors import ArtifactError, Sam3xError, Step

Tell = Callable[[str], None]
PACKAGES = ("sam3x", "torch", "onnxruntime", "onnx", "onnxscript", "openvino", "executorch", "sam3", "numpy")
EXPORT_METRICS = ("capture_seconds", "passes_seconds", "lower_seconds")


def bench(request: BenchRequest, *, command: str | None = None, tell: Tell | None = None) -> BenchReport:
    """Measure every contender in every case.

    A contender that fails is an entry with its error; the others go on.

    Args:
        command: what to say made the report; the command line of the request otherwise.
        tell: told the name of each step as it begins.

    Raises:
        ArtifactError: a folder without a manifest, before anything is started.
    """
    tell = tell or (lambda _: None)
    for folder in request.folders:
        if not (Path(folder) / MANIFEST).is_file():
            remedy = f"Export first: sam3x export -o {folder}"
            raise ArtifactError(f"{folder} holds no {MANIFEST}", remedy=remedy, step=Step.BENCH)
        if is_pipeline(folder):
            remedy = "Measure it by itself: sam3x bench FOLDER."
            raise ArtifactError(f"{folder} holds a whole image model", remedy=remedy, step=Step.BENCH)
    machine = machine_of()
    started, clock = datetime.datetime.now(datetime.timezone.utc), time.perf_counter()
    cases = tuple(
        _case(request, tokens, branch, tell) for tokens in dict.fromkeys(request.tokens) for branch in request.branches
    )
    return BenchReport(
        command=command or command_of(request),
        started=started.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - clock,
        request=request,
        machine=machine,
        cases=cases,
    )


def _case(request: BenchRequest, tokens: int, branch: dict[str, bool], tell: Tell) -> Case:
    sizes = {"batch": request.batch, "tokens": tokens, "prompt_length": request.prompt_length}
    where = f"{tokens} tokens" + (f" {branch_text(branch)}" if len(request.branches) > 1 else "")
    measured: dict[str, dict[str, Any]] = {}
    samples: dict[str, list[tuple[float, float]]] = {}
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory(prefix="sam3x-bench-") as scratch, workers_closed(workers):
        environment = _environment(request.threads, scratch)
        for name, path in contender_names(request).items():
            kind = "artifact" if path in request.folders else name
            measured[name] = {"name": name, "kind": kind}
            job = {
                "kind": kind,
                "path": path,
                "sizes": sizes,
                "flags": branch,
                "output": f"{scratch}/{len(measured)}.npy",
                "profile": request.profile,
                **{key: getattr(request, key) for key in ("threads", "seed", "checkpoint", "module")},
            }
            with _failures_in(measured[name]):
                tell(f"{where}: {name}")
                measured[name].update(_static_metadata(kind, path))
                if kind in ("onnx-default", "openvino"):
                    job["path"] = f"{scratch}/default.onnx"
                    job["d_model"] = _default_file(job, measured, environment, request.timeout)
                    _describe_file(Path(job["path"]), measured[name])
                workers[name] = worker = Worker(job, environment, request.timeout)
                worker.until("first_output")
                measured[name]["cold_start"] = time.perf_counter() - worker.started
                measured[name].update(_known(worker.until("ready")))
        tell(f"{where}: rounds")
        _rounds(request, workers, measured, samples)
        for name, worker in workers.items():
            if "error" not in measured[name]:
                with _failures_in(measured[name]):
                    done = worker.finish()
                    measured[name]["memory"], measured[name]["profile"] = Memory(**done["memory"]), done["profile"]
        for name, values in samples.items():
            if "error" not in measured[name]:
                measured[name]["timing"] = timing_of([wall for wall, _ in values], [cpu for _, cpu in values])
        results = [Result.model_validate({k: v for k, v in known.items() if k != "d_model"}) for known in measured.values()]
        reference, ranked = with_ratios(results, [*([request.reference] if request.reference else []), *request.baselines])
        outputs = {name: Path(scratch) / f"{number}.npy" for number, name in enumerate(measured, start=1)}
        ranked = tuple(_compared(item, next((r for r in ranked if r.name == reference), None), outputs) for item in ranked)
    return Case(**sizes, branch=branch, reference=reference, results=ranked)


def _rounds(
    request: BenchRequest,
    workers: Mapping[str, Worker],
    measured: dict[str, dict[str, Any]],
    samples: dict[str, list[tuple[float, float]]],
) -> None:
    """A, B, C, A, B, C, …: what slows the machine for a while slows all of them."""
    for number in range(request.warmup + request.repeat):
        for name, worker in workers.items():
            if "error" in measured[name]:
                continue
            with _failures_in(measured[name]):
                sample = worker.run()
                if number >= request.warmup:
                    samples.setdefault(name, []).append(sample)


@contextlib.contextmanager
def _failures_in(known: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except ContenderError as error:
        known["error"] = str(error)
    except (OSError, ValueError, Sam3xError) as error:  # a manifest or a file that cannot be read
        known["error"] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _environment(threads: int, scratch: str) -> dict[str, str]:
    """The same number of threads for every runtime; a compile cache of this run alone, so that a cold start is one."""
    count = str(threads)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {
        **dict.fromkeys(names, count),
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
        "TORCHINDUCTOR_COMPILE_THREADS": count,
    }


def _known(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: message[key] for key in ("weights_sha256", "weight_bytes", "d_model", "export_seconds") if key in message}


# ---- what needs no run


def _static_metadata(kind: str, path: str) -> dict[str, Any]:
    """From the folder of an artifact: how it was exported, its files, its nodes."""
    if kind != "artifact":
        return {}
    folder = Path(path)
    manifest = read_manifest(folder)
    asked = {**manifest.spec, **manifest.target_options}
    names = ("dac", "pre_norm", "branches", "attention", "precision", "weights")
    known: dict[str, Any] = {
        "options": {"target": manifest.target, **{name: _word(asked[name]) for name in names if asked.get(name) is not None}},
        "file_bytes": sum(
            (folder / name).stat().st_size for name in manifest.files if (folder / name).is_file() and ".bpte" not in name
        ),
    }
    if all(name in manifest.metrics for name in EXPORT_METRICS):
        known["export_seconds"] = sum(manifest.metrics[name] for name in EXPORT_METRICS)
    operators = [manifest.metadata.get(name) for name in ("delegated", "portable")]
    if all(isinstance(item, dict) for item in operators):
        known["nodes"] = sum(sum(item.values()) for item in operators if item)
    for name in manifest.files:
        if name.endswith(".onnx"):
            known.update(_onnx_metadata(folder / name))
    return known


def _word(value: Any) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _describe_file(path: Path, known: dict[str, Any]) -> None:
    known["file_bytes"] = path.stat().st_size
    known.update(_onnx_metadata(path))


def _onnx_metadata(path: Path) -> dict[str, Any]:
    """Nodes and bytes of the weights, sub-graphs included; nothing where onnx is not installed or the file is no model."""
    try:
        import onnx
    except ImportError:
        return {}
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # protobuf's DecodeError has no public home; the contender itself will say what is wrong
        return {}
    graphs = [model.graph]
    for graph in graphs:  # grows while it is read
        for node in graph.node:
            for attribute in node.attribute:
                graphs += [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
    weight_bytes = 0
    for graph in graphs:
        for item in graph.initializer:
            count = 1
            for size in item.dims:
                count *= size
            weight_bytes += count * onnx.helper.tensor_dtype_to_np_dtype(item.data_type).itemsize
    inner = sum(len(graph.node) for graph in graphs[1:])
    return {"nodes": len(model.graph.node), "inner_nodes": inner, "weight_bytes": weight_bytes}


def _default_file(
    job: Mapping[str, Any], measured: dict[str, dict[str, Any]], environment: Mapping[str, str], timeout: float
) -> int:
    """Write ``torch.onnx.export``'s file in a process of its own, once a case; returns the encoder's width."""
    name = "onnx-default" if job["kind"] == "openvino" else "openvino"
    if Path(job["path"]).is_file() and "d_model" in measured.get(name, {}):
        shared = _known(measured[name])
    else:
        worker = Worker({**job, "kind": "export"}, environment, timeout)
        with workers_closed({"export": worker}):
            shared = _known(worker.until("ready"))
    measured[job["kind"]].update({key: value for key, value in shared.items() if key != "weight_bytes"})
    return shared["d_model"]


def _compared(result: Result, reference: Result | None, outputs: Mapping[str, Path]) -> Result:
    """How far the first output is from the reference's: a fast wrong answer is none."""
    if reference is None or result.name == reference.name or result.weights_sha256 != reference.weights_sha256:
        return result
    paths = outputs[result.name], outputs[reference.name]
    if not all(path.is_file() for path in paths):
        return result
    import numpy as np

    mine, other = (np.load(path) for path in paths)
    if mine.shape != other.shape and mine.shape == (other.shape[1], other.shape[0], *other.shape[2:]):
        mine = mine.swapaxes(0, 1)  # upstream's encoder returns (tokens, batch, width)
    if mine.shape != other.shape:
        return result
    return result.model_copy(update={"from_reference": float(np.abs(mine.astype("float64") - other).max())})


def machine_of() -> Machine:
    """This machine and the versions of what is measured on it."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    load = None
    with contextlib.suppress(OSError, AttributeError):
        load = os.getloadavg()[0]
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_mb=psutil.virtual_memory().total / 1e6,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=versions,
        load_before=load,
    )


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
