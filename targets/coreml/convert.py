"""A captured program as an ML program under the names and ranges of its contract."""

from __future__ import annotations

from typing import Any

import torch

from sam3x.capture.program import CapturedProgram
from sam3x.targets.quiet import native_silence, suppressed_output


def convert(captured: CapturedProgram) -> tuple[Any, dict[str, Any]]:
    """Return coremltools' ``MLModel``, and what the manifest tells of it.

    Raises:
        Exception: whatever coremltools raises.
    """
    with suppressed_output(), native_silence():
        import coremltools as ct

        with torch.no_grad():
            program = captured.program.run_decompositions({})  # the dialect that coremltools takes
        made = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
        spec = made.get_spec()
        for items, names in ((spec.description.input, captured.input_names), (spec.description.output, captured.output_names)):
            given = [item.name for item in items]
            for index, name in enumerate(given):  # a name may be that of another one, too
                ct.utils.rename_feature(spec, name, f"feature_{index}")
            for index, name in enumerate(names):
                ct.utils.rename_feature(spec, f"feature_{index}", name)
        _bound(spec, captured)
        return ct.models.MLModel(spec, weights_dir=made.weights_dir, skip_model_load=True), {
            "deployment_target": "iOS 17, macOS 14"
        }


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
