"""Network and engine: conversion of the whole graph, profiles, the builder, and what it says of the engine."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sam3x.errors import BuilderError, LoweringError, Sam3xError, Step, TargetUnavailableError
from sam3x.passes.attention.legalize_attention_for_trt import UNLIMITED
from sam3x.passes.attention.operators import TILED_ATTENTION
from sam3x.passes.base import graph_modules
from sam3x.targets.tensorrt.driver import import_torch_tensorrt, named_device
from sam3x.targets.tensorrt.in_subprocess import Crashed, in_subprocess
from sam3x.targets.tensorrt.options import TrtOptions, capability_of, optima

if TYPE_CHECKING:
    from sam3x.capture.program import CapturedProgram

T = TypeVar("T")
_LOG = "torch_tensorrt [TensorRT Conversion Context]"
_SIZES = "Data-dependent shapes"
"""What the builder says of sizes it cannot follow into a conditional or a loop: dynamic tokens with dac and several masks."""
_OWN = ("Internal Error", "MyelinCheckException")
"""What the builder says where an assertion of its own is broken."""
_FIGURES = {"activation_bytes": "Total Activation Memory", "weights_bytes": "Total Weights Memory"}


@dataclass(frozen=True, slots=True)
class Built:
    """A serialized engine and the metadata of it."""

    engine: bytes
    metadata: dict[str, Any] = field(default_factory=dict)


class UnreadableError(Exception):
    """torch cannot load a program that it saved itself, as with some sizes that a flag decides."""


_REMEDY = "Allow attention more memory (--attention-memory 2GB), or take --precision fp16."
"""Where no form of attention builds."""
FORMS = {
    "loops": "attention in loops over images or tiles of queries",
    "tiles": "attention in tiles of queries, one after another",
    "layers": "attention as TensorRT's own layers",
    "products": "attention as products and a softmax, all scores in memory at once",
    "plain": "the network as it is",
}
"""Forms of a network → what they are."""


def build(captured: CapturedProgram, options: TrtOptions, capability: str) -> Built:
    """Build one engine of the whole graph for ``capability``, a driver or none.

    TensorRT's builder crashes on some networks, so it works in a process of its own, and where it crashes the next form is
    built by another. ``metadata["form"]`` says which it came to, and ``metadata["notes"]`` why.

    Raises:
        LoweringError: operations that cannot be converted, by name and reason, or what the builder says.
        BuilderError: it crashed on every form.
    """
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="sam3x-trt-") as folder:
        path = Path(folder) / "program.pt2"
        _save(captured, path)
        slim = replace(captured, program=None, samples=(), eager=None, exact=None)  # type: ignore[arg-type]
        for form in forms_of(captured):
            try:
                built = in_builder_process(engine_of, slim, path, options, capability, form)
            except UnreadableError:  # the builder works in this process then: what it raises is told, a crash would end both
                built = _engine(captured, options, capability, form)
            except BuilderError as error:
                failed.append(f"{FORMS[form]}: {error.fact}")
                remedy = _REMEDY if form == "products" else error.remedy
                continue
            metadata = {**built.metadata, "form": FORMS[form]}
            if failed:
                metadata["notes"] = [f"built with {FORMS[form]}; TensorRT's builder failed on other forms: {'; '.join(failed)}"]
            return Built(built.engine, metadata)
    raise BuilderError("; ".join(failed), subject="trt", remedy=remedy)


def forms_of(captured: CapturedProgram) -> list[str]:
    """The forms to try, the best first: of attention in tiles, of attention that TensorRT fuses, of none."""
    budgets = [
        int(node.args[5])  # type: ignore[arg-type]
        for _, module in graph_modules(captured.program)
        for node in module.graph.find_nodes(op="call_function", target=TILED_ATTENTION)
    ]
    if not budgets:
        return ["plain"]
    return ["loops", "tiles", "products"] if min(budgets) < UNLIMITED else ["layers", "products"]


def _save(captured: CapturedProgram, path: Path) -> None:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that weights are views of each other
            torch.export.save(_with_weights_of_its_own(captured.program), path)
    except Exception as error:
        raise LoweringError(
            f"the graph cannot be handed to the builder: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
            subject="trt",
        ) from error


def _with_weights_of_its_own(program: Any) -> Any:
    """A copy whose tensors share no memory: of views, torch looks for the whole they are parts of, and fails on some."""

    import torch

    def own(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        new = value.detach().clone(memory_format=torch.contiguous_format)
        return torch.nn.Parameter(new, requires_grad=False) if isinstance(value, torch.nn.Parameter) else new

    result = copy.copy(program)
    result._state_dict = {name: own(value) for name, value in program.state_dict.items()}
    result._constants = {name: own(value) for name, value in program.constants.items()}
    return result


def in_builder_process(work: Callable[..., T], *args: Any) -> T:
    """``in_subprocess``, a crash told as an error of the export.

    Raises:
        BuilderError: the process ended. LoweringError: whatever else went wrong there.
    """
    try:
        return in_subprocess(work, *args)
    except Crashed as crash:
        raise BuilderError(
            f"TensorRT's builder crashed on the network ({crash})",
            subject="trt",
            remedy="Take another --precision or --format.",
        ) from None
    except (Sam3xError, UnreadableError):
        raise
    except Exception as error:
        raise LoweringError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", subject="trt") from error


def engine_of(slim: CapturedProgram, path: Path, options: TrtOptions, capability: str, form: str) -> Built:
    """Load the program at ``path`` and build its engine, in this process. ``slim``: the capture without its program.

    Raises:
        UnreadableError: the program cannot be loaded.
    """
    import torch

    import sam3x.passes.attention.operators
    import sam3x.passes.linear.tile_feed_forward  # noqa: F401 - and this

    try:
        program = torch.export.load(path)
    except Exception as error:
        raise UnreadableError(str(error).partition(chr(10))[0]) from error
    return _engine(replace(slim, program=program), options, capability, form)


def _engine(captured: CapturedProgram, options: TrtOptions, capability: str, form: str) -> Built:
    with named_device(capability_of(capability)), builder_log() as log:
        import_torch_tensorrt()
        network, interpreter, profile = convert(captured, options, log, form)
        started = time.perf_counter()
        config = interpreter._populate_trt_builder_config()
        engine = serialize(interpreter.builder, network, config, capability, options, log)
        return Built(engine, {**metadata_of(network), "profile": profile, **metrics(log, engine, started)})


def convert(captured: CapturedProgram, options: TrtOptions, log: list[str], form: str) -> tuple[Any, Any, dict[str, str]]:
    """The network, the interpreter that holds its weights, and the profile in words. Call inside ``named_device``.

    Raises:
        LoweringError: every operation that no converter takes, or the first that fails, with TensorRT's reason from ``log``.
    """
    from sam3x.targets.tensorrt.interpreter import described

    module = captured.program.module(check_guards=False)
    with described(module):
        return _convert(module, captured, options, log, form)


def _convert(
    module: Any, captured: CapturedProgram, options: TrtOptions, log: list[str], form: str
) -> tuple[Any, Any, dict[str, str]]:
    from sam3x.targets.tensorrt.interpreter import Interpreter, unconverted

    left = unconverted(module)
    if left:
        shown = "; ".join(f"{name} ({reason})" for name, reason in left[:8]) + ("; …" if len(left) > 8 else "")
        raise LoweringError(
            f"{len(left)} operations have no form in TensorRT, and one engine is promised: {shown}",
            subject="trt",
            remedy="Export to ONNX: --target onnx.",
        )
    half = captured.ranges[captured.halved][1] if captured.halved else 1  # without dac every size has a name
    bounds = defaultdict(lambda: half, {name: captured.ranges[meaning][1] for name, meaning in captured.dim_names.items()})
    shapes = shapes_of(captured, options)
    dtypes = {node.name: node.meta["val"].dtype for node in module.graph.nodes if node.op == "placeholder"}
    inputs = [_input(shapes[name], dtypes[name]) for name in captured.input_names]
    explicit = options.attention == "explicit"
    interpreter = Interpreter(module, inputs, (captured.input_names, captured.output_names), bounds, form, explicit)
    try:
        return interpreter.construct(), interpreter, in_words(shapes)
    except Exception as error:
        node = interpreter._cur_node
        said = next((line for line in log if "Error" in line), f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        raise LoweringError(
            f"{getattr(node, 'name', 'a node')} ({getattr(node, 'target', '')}) cannot be converted: {said[:400]}",
            subject="trt",
        ) from error


def shapes_of(captured: CapturedProgram, options: TrtOptions) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Input → the least, the tuned-for and the largest shape, in graph order."""
    ranges = captured.ranges
    best = {**_usual(captured), **optima(ranges, options)}
    found = {}
    for node in captured.program.graph.nodes:
        if node.op == "placeholder" and node.name in captured.input_names:
            sizes = [size if isinstance(size, int) else captured.dim_names[str(size)] for size in node.meta["val"].shape]
            low = [size if isinstance(size, int) else ranges[size][0] for size in sizes]
            opt = [size if isinstance(size, int) else best[size] for size in sizes]
            high = [size if isinstance(size, int) else ranges[size][1] for size in sizes]
            found[node.name] = (low, opt, high)
    return found


def in_words(shapes: Mapping[str, tuple[list[int], list[int], list[int]]]) -> dict[str, str]:
    """``1x36x32 / 1x36x32 / 4x36x32``, or one shape where nothing is dynamic."""
    return {
        name: " / ".join("x".join(map(str, shape)) or "scalar" for shape in (three if three[0] != three[2] else three[:1]))
        for name, three in shapes.items()
    }


def _usual(captured: CapturedProgram) -> dict[str, int]:
    """Of a pipeline's component: one picture, one prompt, one box, otherwise the most."""
    return {name: low if low == 1 else high for name, (low, high) in captured.ranges.items()}


def _input(shapes: tuple[list[int], list[int], list[int]], dtype: Any) -> Any:
    import torch_tensorrt

    low, opt, high = shapes
    if low == high:
        return torch_tensorrt.Input(shape=low, dtype=dtype)
    return torch_tensorrt.Input(min_shape=low, opt_shape=opt, max_shape=high, dtype=dtype)


def serialize(builder: Any, network: Any, config: Any, capability: str, options: TrtOptions, log: list[str]) -> bytes:
    """Build for ``capability``; TensorRT itself builds for the GPU that is there, TensorRT-RTX for any it knows."""
    import tensorrt as trt
    import torch

    if options.precision != "tf32":
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and a thousand times further off than float32
    if hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability.upper(), trt.ComputeCapability.CURRENT), 0)
    elif not torch.cuda.is_available() or torch.cuda.get_device_capability() != capability_of(capability):
        raise TargetUnavailableError(
            f"TensorRT builds for the GPU of this machine only, which is not {capability}",
            subject="trt",
            remedy='Build ahead of time with TensorRT-RTX: pip install "sam3x[trt-rtx]"',
            step=Step.LOWER,
        )

    plan = builder.build_serialized_network(network, config)
    if plan is None:
        said = ([line for line in log if "Error" in line] or log or ["no reason given"])[-1][:400]
        if _SIZES in said:
            raise LoweringError(
                f"the builder refused the network: {said}",
                subject="trt",
                remedy="Fix the tokens (--tokens 5184), fix dac (--dac off), or leave a mask out (--inputs).",
            )
        if any(word in said for word in _OWN):
            other = "engine" if options.format != "engine" else "plan-onnx"
            raise BuilderError(
                f"TensorRT's own optimizer failed on the network: {said}",
                subject="trt",
                remedy=(
                    f"Other forms of it may build: --format {other}, --attention-memory 2GB, --precision fp16, or --dac off."
                ),
            )
        raise LoweringError(f"the builder refused the network: {said}", subject="trt")
    return bytes(plan)


def metadata_of(network: Any) -> dict[str, Any]:
    """What the network is made of."""
    kinds = Counter(str(network.get_layer(i).type).rpartition(".")[2].lower() for i in range(network.num_layers))
    ends = [network.get_input(i) for i in range(network.num_inputs)] + [
        network.get_output(i) for i in range(network.num_outputs)
    ]
    return {
        "engines": 1,
        "left_to_torch": 0,
        "attentions": kinds["attention_input"] + kinds["softmax"],
        "attention_layers": kinds["attention_input"],
        "tiled_attention_loops": kinds["loop_output"],
        "conditionals": kinds["condition"],
        "layers": dict(kinds.most_common()),
        "dtypes": {end.name: str(end.dtype).rpartition(".")[2].lower() for end in ends},
    }


def metrics(log: list[str], engine: bytes, started: float) -> dict[str, Any]:
    """Bytes of the engine, of its activations and weights as the builder tells them, and the seconds it took."""
    found: dict[str, Any] = {"engine_bytes": len(engine)}
    for name, words in _FIGURES.items():
        sizes = [int(size) for line in log for size in re.findall(rf"{words}: (\d+) bytes", line)]
        if sizes:
            found[name] = sizes[-1]
    return {**found, "build_seconds": round(time.perf_counter() - started, 2)}


@contextlib.contextmanager
def builder_log() -> Iterator[list[str]]:
    """What TensorRT says while it builds, kept from the user's terminal; the logger comes back as it was."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger(_LOG), Keep()
    before = (logger.level, logger.propagate)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
