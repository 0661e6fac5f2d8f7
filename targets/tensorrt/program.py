"""``--format ep``: a ``torch.export`` program that holds the engine, for hosts that run PyTorch. Made on the GPU machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3x.errors import ArtifactError, LoweringError, Step, TargetUnavailableError
from sam3x.targets.tensorrt.build import shapes_of
from sam3x.targets.tensorrt.options import TrtOptions

if TYPE_CHECKING:
    import numpy as np
    import torch

    from sam3x.capture.program import CapturedProgram


_OUTPUTS = "outputs.json"
"""File inside the program's archive: the names of its outputs, in order."""


def write_program(captured: CapturedProgram, path: Path, options: TrtOptions) -> dict[str, Any]:
    """Build the engine, wrap it as one module, export and save.

    Raises:
        LoweringError: as for an engine.
    """
    from torch_tensorrt.dynamo._settings import CompilationSettings
    from torch_tensorrt.dynamo.runtime import TorchTensorRTModule

    from sam3x.targets.tensorrt.build import build
    from sam3x.targets.tensorrt.driver import this_gpu

    started = time.perf_counter()
    built = build(captured, options, options.compute_capability or this_gpu())
    module = TorchTensorRTModule(
        built.engine,
        list(captured.input_names),
        list(captured.output_names),
        settings=CompilationSettings(),
        name="sam3x",
        symbolic_shape_expressions=shape_expressions(captured),
    )
    save_program(module, captured, path, options, "cuda")
    return {**built.metadata, "build_seconds": round(time.perf_counter() - started, 2)}


def shape_expressions(captured: CapturedProgram) -> Any:
    """The sizes of inputs and outputs as Torch-TensorRT's runtime wants to know them; without, it cannot be exported."""
    from torch_tensorrt.dynamo.conversion._symbolic_shape_capture import extract_symbolic_shape_expressions

    return extract_symbolic_shape_expressions(captured.program.module(check_guards=False))


def save_program(module: torch.nn.Module, captured: CapturedProgram, path: Path, options: TrtOptions, device: str) -> None:
    """Export ``module``, called with the inputs in graph order, with the profile's dynamic sizes.

    Raises:
        LoweringError: torch.export refuses it.
    """
    import torch

    shapes = shapes_of(captured, options)
    dtypes = {n.name: n.meta["val"].dtype for n in captured.program.graph.nodes if n.op == "placeholder"}
    # the largest: torch.export would take a size of 1 for one that is always 1
    example = tuple(torch.zeros(shapes[name][2], dtype=dtypes[name], device=device) for name in captured.input_names)
    dynamic = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, (low, high) in enumerate(zip(three[0], three[2], strict=True)) if low != high}
        for three in (shapes[name] for name in captured.input_names)
    )
    try:
        program = torch.export.export(module, example, dynamic_shapes=(dynamic,), strict=False)
    except Exception as error:
        raise LoweringError(
            f"the engine cannot be wrapped: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
            subject="trt",
            remedy="Choose --format engine.",
        ) from error
    torch.export.save(program, path, extra_files={_OUTPUTS: json.dumps(list(captured.output_names))})


class ProgramRunner:
    """Loads the program and runs it on ``device``.

    Raises:
        TargetUnavailableError: no GPU. ArtifactError: torch cannot load the program.
    """

    def __init__(self, path: Path, device: str = "cuda") -> None:
        import torch

        if device == "cuda":
            if not torch.cuda.is_available():
                raise TargetUnavailableError(
                    f"{path.name} runs on a GPU, and there is none here",
                    remedy="On a GPU machine: sam3x verify FOLDER",
                    step=Step.LOAD,
                )
            import torch_tensorrt  # noqa: F401 - its operators

        files = {_OUTPUTS: ""}
        try:
            self._module = torch.export.load(path, extra_files=files).module()
            self._outputs = json.loads(files[_OUTPUTS])
        except Exception as error:
            raise ArtifactError(f"torch cannot load {path}: {error}", remedy="Export again.") from error
        self._device = device

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import numpy as np
        import torch

        given = [torch.from_numpy(np.asarray(value, order="C")).to(self._device) for value in inputs.values()]
        with torch.no_grad():
            output = self._module(*given)
        values = output if isinstance(output, (tuple, list)) else (output,)
        return {name: value.cpu().numpy() for name, value in zip(self._outputs, values, strict=True)}
