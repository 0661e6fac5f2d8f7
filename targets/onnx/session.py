"""Sessions of ONNX Runtime: threads, execution providers, and which package brings which."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sam3x.targets.onnx.openvino as openvino
from sam3x.errors import SpecError, Step, TargetUnavailableError, did_you_mean

Provider = str | tuple[str, dict[str, Any]]
"""A provider's full name, alone or with its options, as ``onnxruntime.InferenceSession`` takes it."""

_SUFFIX = "ExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
_PACKAGES = {
    "CUDA": "onnxruntime-gpu",
    "Tensorrt": "onnxruntime-gpu",
    "NvTensorRTRTX": "onnxruntime-trt-rtx",
    "Dml": "onnxruntime-directml",
    "OpenVINO": "openvino",
    "MIGraphX": "onnxruntime-migraphx",
    "ROCM": "onnxruntime-rocm",
    "QNN": "onnxruntime-qnn",
    "CANN": "onnxruntime-cann",
    "WebGpu": "onnxruntime-webgpu",
}


def checked_threads(threads: Any) -> int:
    """Threads of one operator.

    Raises:
        SpecError: no whole number from 1.
    """
    try:
        number = 0 if isinstance(threads, bool) else operator.index(threads)
    except TypeError:
        number = 0
    if number < 1:
        raise SpecError(f"threads is a whole number from 1, got {threads!r}", step=Step.LOAD)
    return number


def checked_providers(providers: Any) -> list[Provider]:
    """Providers under ONNX Runtime's full names; ``cuda`` is read as ``CUDAExecutionProvider``.

    Args:
        providers: a name, or a list of names and of pairs (name, options).

    Raises:
        SpecError: something else, or a name that no ONNX Runtime has.
        TargetUnavailableError: this ONNX Runtime lacks it, with the package that brings it.
    """
    given = [providers] if isinstance(providers, str) else list(providers) if isinstance(providers, Sequence) else []
    if not given:
        raise SpecError(
            f"providers is a list of names of ONNX Runtime's, as in ['cuda', 'cpu'], got {providers!r}", step=Step.LOAD
        )
    return [_checked(item) for item in given]


def _checked(item: Any) -> Provider:
    ort = _onnxruntime()
    name, options = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
    if not isinstance(name, str) or not (options is None or isinstance(options, Mapping)):
        raise SpecError(f"a provider is a name, or a name and its options, got {item!r}", step=Step.LOAD)
    known = {full.removesuffix(_SUFFIX).lower(): full for full in (*ort.get_all_providers(), *_full_names())}
    known["directml"] = f"Dml{_SUFFIX}"
    full = known.get(name.removesuffix(_SUFFIX).lower())
    if full is None:
        hint = did_you_mean(name.lower(), known) or f"There are {', '.join(sorted(known))}."
        raise SpecError(f"ONNX Runtime has no provider {name!r}", remedy=hint, step=Step.LOAD)
    if full not in ort.get_available_providers() and not (full == OPENVINO and openvino.installed()):
        package = _PACKAGES.get(full.removesuffix(_SUFFIX))
        beside = "" if full == OPENVINO else ", in place of onnxruntime"
        raise TargetUnavailableError(
            f"the installed ONNX Runtime {ort.__version__} comes without {full}",
            remedy=f"Install the package that brings it{beside}: pip install {package}" if package else "",
            step=Step.LOAD,
        )
    return full if options is None else (full, {str(key): value for key, value in options.items()})


def options_of_openvino(providers: Sequence[Provider]) -> dict[str, Any] | None:
    """Its options where OpenVINO's own runtime is to run a file: it is preferred, and this ONNX Runtime comes without it."""
    name, options = (providers[0], {}) if providers and isinstance(providers[0], str) else (*(providers or [("", {})])[0],)
    return dict(options) if name == OPENVINO and OPENVINO not in _onnxruntime().get_available_providers() else None


def fallbacks(path: Path, providers: Sequence[Provider]) -> tuple[int, Counter[str]]:
    """How many nodes a file has, and those that the preferred provider leaves to others, by operator.

    Nodes are those after ONNX Runtime has optimized the graph, in sub-graphs too.
    """
    options = options_of_openvino(providers)
    if options is not None:
        return openvino.left_out(path, options)
    session = open_session(path, None, providers, assignment=True)
    first = providers[0] if isinstance(providers[0], str) else providers[0][0]
    parts = [(part.ep_name, node.op_type) for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]
    return len(parts), Counter(op_type for name, op_type in parts if name != first)


def _full_names() -> list[str]:
    return [f"{name}{_SUFFIX}" for name in _PACKAGES]


def open_session(
    path: Path,
    threads: int | None,
    providers: Sequence[Provider],
    *,
    assignment: bool = False,
    profile: Path | None = None,
) -> Any:
    """An ``onnxruntime.InferenceSession``.

    Args:
        assignment: remember which provider has which node.
        profile: how the name of the file begins that the profiler writes; None: it is off.

    Raises:
        TargetUnavailableError: onnxruntime is not installed, or a provider could not be started and would be left out.
    """
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # it plans a second run's memory beside that of the first and keeps both
    if assignment:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    wanted = list(providers) or ["CPUExecutionProvider"]
    session = ort.InferenceSession(str(path), options, providers=wanted)
    started = session.get_providers()
    for item in wanted:
        name = item if isinstance(item, str) else item[0]
        if name not in started:
            raise TargetUnavailableError(
                f"{name} could not be started, and ONNX Runtime would go on with {', '.join(started)}",
                remedy="Install the driver and libraries it needs.",
                step=Step.LOAD,
            )
    return session


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise TargetUnavailableError(
            "running an ONNX artifact needs onnxruntime", remedy='Install it: pip install "sam3x[runtime]"', step=Step.LOAD
        ) from None
    return onnxruntime
