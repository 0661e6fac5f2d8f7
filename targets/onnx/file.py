"""An ONNX model to its file: weights past 1 GB beside it, checked once written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sam3x.errors import LoweringError

if TYPE_CHECKING:
    import onnx_ir as ir

_LARGEST_PROTO = 1_000_000_000  # protobuf ends at 2 GiB, and holds everything twice while it writes


def write(model: ir.Model, path: Path, *, external_data: bool) -> None:
    """Write ``path``, and ``path`` with ``.data`` appended for the weights where asked for or where they are large.

    Args:
        model: its weights may lie in other files, which may go once this returns.

    Raises:
        LoweringError: the graph is not valid ONNX.
    """
    import onnx
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    path.parent.mkdir(parents=True, exist_ok=True)
    if external_data or size > _LARGEST_PROTO:
        ir.save(model, path, external_data=f"{path.name}.data")
    else:
        ir.save(ir.external_data.load_to_model(model), path)  # what lay beside another file would still point there
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LoweringError(f"the graph is no valid ONNX: {str(error).partition(chr(10))[0]}", subject="onnx") from error
