"""A captured program as an ML program under the names and ranges of its contract."""

from __future__ import annotations

import json
import operator
import tempfile
from pathlib import Path
from typing import Any

import torch

from sam3x.capture.program import CapturedProgram
from sam3x.passes.cleanup.canonicalize_sizes import CanonicalizeSizesPass
from sam3x.passes.cleanup.unify_dimensions import UnifyDimensionsPass
from sam3x.passes.pipeline import PassPipeline
from sam3x.targets.coreml.dtypes import OUTPUT_DTYPES
from sam3x.targets.quiet import native_silence, suppressed_output


def write(captured: CapturedProgram, package: Path) -> dict[str, Any]:
    """Write ``package``, and return what the manifest tells of it. Nothing of coremltools' own stays behind.

    Raises:
        Exception: whatever coremltools raises.
    """
    passes = PassPipeline((UnifyDimensionsPass(captured.dim_names), CanonicalizeSizesPass()))
    captured, _ = passes.run(captured)
    with suppressed_output(), native_silence(), tempfile.TemporaryDirectory(dir=package.parent) as folder:
        import coremltools as ct

        with torch.no_grad():
            program = captured.program.run_decompositions({})  # the dialect that coremltools takes
        _name_quotients(program.graph)
        pipeline = ct.PassPipeline.DEFAULT
        # it takes scale and bias for a norm of variance 1, and adds 1e-5 to that
        pipeline.remove_passes({"common::fuse_elementwise_to_batchnorm"})
        made = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=pipeline,
            skip_model_load=True,
            package_dir=str(Path(folder, "converted.mlpackage")),  # else it is kept until the process ends
        )
        spec = made.get_spec()
        for items, names in ((spec.description.input, captured.input_names), (spec.description.output, captured.output_names)):
            given = [item.name for item in items]
            for index, name in enumerate(given):  # a name may be that of another one, too
                ct.utils.rename_feature(spec, name, f"feature_{index}")
            for index, name in enumerate(names):
                ct.utils.rename_feature(spec, f"feature_{index}", name)
        _bound(spec, captured)
        spec.description.metadata.userDefined[OUTPUT_DTYPES] = json.dumps(_output_dtypes(captured))
        ct.utils.save_spec(spec, str(package), weights_dir=made.weights_dir)
    return {"deployment_target": "iOS 17, macOS 14"}


def _output_dtypes(captured: CapturedProgram) -> dict[str, str]:
    values = [node.meta["val"] for node in captured.program.graph.output_node().args[0]]
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in zip(captured.output_names, values, strict=True)}
    return {name: dtype for name, dtype in dtypes.items() if dtype != "float32"}


def sam3x_quotient(size: Any, divisor: Any) -> Any:
    """``size // divisor``, under a name of its own: coremltools' ``floordiv`` gives a float, which is no size."""
    return size // divisor


def _name_quotients(graph: torch.fx.Graph) -> None:
    from coremltools.converters.mil import Builder, register_torch_op
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    def convert(context: Any, node: Any) -> None:
        size, divisor = _get_inputs(context, node, expected=2)
        context.add(Builder.floor_div(x=size, y=divisor, name=node.name))

    convert.__name__ = sam3x_quotient.__name__
    register_torch_op(convert, override=True)  # adds a name, and changes none
    for node in graph.nodes:
        if node.target is operator.floordiv:
            node.target = sam3x_quotient


def _bound(spec: Any, captured: CapturedProgram) -> None:
    """Put the sizes of the request in place of those that the trace allows; the least of each is the default one."""
    shapes = {node.name: node.meta["val"].shape for node in captured.program.graph.nodes if node.op == "placeholder"}
    for item in spec.description.input:
        array = item.type.multiArrayType
        for axis, size in enumerate(shapes[item.name]):
            meaning = captured.dim_names.get(str(size))
            if meaning is not None:
                sizes = array.shapeRange.sizeRanges[axis]
                sizes.lowerBound, sizes.upperBound = captured.ranges[meaning]
                array.shape[axis] = sizes.lowerBound
