"""ONNX for ``trtexec``: the file of the ONNX target, in any precision, proven to build by TensorRT's own parser."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3x.errors import LoweringError
from sam3x.targets.onnx.target import OnnxOptions, OnnxTarget
from sam3x.targets.tensorrt.build import builder_log, in_builder_process, in_words, metadata_of, metrics, serialize, shapes_of
from sam3x.targets.tensorrt.driver import import_torch_tensorrt, named_device
from sam3x.targets.tensorrt.options import TrtOptions, capability_of

if TYPE_CHECKING:
    from sam3x.capture.program import CapturedProgram
    from sam3x.passes.base import Pass

_ONNX = OnnxOptions.model_validate({"attention": "decomposed"})
"""Products and a softmax, which TensorRT fuses by itself in half precision."""


def onnx_passes() -> tuple[Pass, ...]:
    """What the ONNX target does to the graph."""
    return OnnxTarget().legalization_passes(_ONNX)


def write_plan_onnx(captured: CapturedProgram, path: Path, options: TrtOptions, capability: str) -> dict[str, Any]:
    """Write the file, and build an engine of it that is thrown away.

    Raises:
        LoweringError: what the parser or the builder says.
    """
    OnnxTarget().lower(captured, path, _ONNX)
    shapes = shapes_of(captured, options)
    metadata = in_builder_process(metadata_of_file, path, shapes, options, capability)
    return {**metadata, "profile": in_words(shapes), "trtexec": " ".join(_command(path, shapes, options))}


def metadata_of_file(path: Path, shapes: Any, options: TrtOptions, capability: str) -> dict[str, Any]:
    """Build an engine of the file in this process; what is known of it."""
    with named_device(capability_of(capability)), builder_log() as log:
        import_torch_tensorrt()
        import tensorrt as trt
        from torch_tensorrt.logging import TRT_LOGGER

        builder = trt.Builder(TRT_LOGGER)
        typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        parser = trt.OnnxParser(network, TRT_LOGGER)
        if not parser.parse_from_file(str(path)):
            error = parser.get_error(0)
            raise LoweringError(
                (f"TensorRT's ONNX parser refuses {error.node_name() or 'the file'} ({error.node_operator()}): {error.desc()}"),
                subject="trt",
                remedy="Choose --branches select, or --format engine.",
            )
        profile, config = builder.create_optimization_profile(), builder.create_builder_config()
        for name, three in shapes.items():
            if three[0] != three[2]:
                profile.set_shape(name, *three)
        if any(three[0] != three[2] for three in shapes.values()):
            config.add_optimization_profile(profile)
        started = time.perf_counter()
        engine = serialize(builder, network, config, capability, options, log)
        return {**metadata_of(network), **metrics(log, engine, started)}


def _command(path: Path, shapes: Any, options: TrtOptions) -> list[str]:
    """The command that builds the engine on the GPU machine."""
    words = ["trtexec", f"--onnx={path.name}", "--stronglyTyped", f"--saveEngine={path.with_suffix('.engine').name}"]
    if options.precision == "fp32":
        words.append("--noTF32")
    for index, end in enumerate(("min", "opt", "max")):
        dynamic = [f"{name}:{'x'.join(map(str, three[index]))}" for name, three in shapes.items() if three[0] != three[2]]
        if dynamic:
            words.append(f"--{end}Shapes={','.join(dynamic)}")
    return words
