"""``--format ep``: a ``torch.export`` program that holds the engine, for hosts that run PyTorch. Made on the GPU machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3x.errors import ArtifactError, LoweringError, TargetUnavailableError
from sam3x.targets.trt_build import in_words, shapes_of
from sam3x.targets.trt_options import TrtOptions

if TYPE_CHECKING:
    import numpy as np

    from sam3x.program import CapturedProgram


def write_program(captured: CapturedProgram, path: Path, options: TrtOptions) -> dict[str, Any]:
    """Build the engine, wrap it as one module, export and save.

    Raises:
        LoweringError: as for an engine.
    """
    import torch
    from torch_tensorrt.dynamo._settings import CompilationSettings
    from torch_tensorrt.dynamo.runtime import TorchTensorRTModule

    from sam3x.targets.trt_build import build
    from sam3x.targets.trt_target import this_gpu

    started = time.perf_counter()
    built = build(captured, options, options.compute_capability or this_gpu())
    module = TorchTensorRTModule(
        built.engine, list(captured.input_names), list(captured.output_names), settings=CompilationSettings(), name="sam3x"
    )
    shapes = shapes_of(captured, options)
    dtypes = {n.name: n.meta["val"].dtype for n in captured.program.graph.nodes if n.op == "placeholder"}
    example = tuple(torch.zeros(shapes[name][1], dtype=dtypes[name], device="cuda") for name in captured.input_names)
    dynamic = tuple(
        {axis: torch.export.Dim.AUTO for axis, (low, high) in enumerate(zip(three[0], three[2], strict=True)) if low != high}
        for three in shapes.values()
    )
    try:
        program = torch.export.export(module, example, dynamic_shapes=(dynamic,), strict=False)
    except Exception as error:
        raise LoweringError(
            f"step 4/4 trt: the engine cannot be wrapped: {type(error).__name__}: {str(error).partition(chr(10))[0]}. "
            "Choose --format engine."
        ) from error
    torch.export.save(program, path)
    return {**built.facts, "profile": in_words(shapes), "build_seconds": round(time.perf_counter() - started, 2)}


class ProgramRunner:
    """Loads the program and runs it on the GPU."""

    def __init__(self, path: Path) -> None:
        import torch

        if not torch.cuda.is_available():
            raise TargetUnavailableError(f"load: {path.name} runs on a GPU, and there is none here. sam3x verify FOLDER there.")
        import torch_tensorrt  # noqa: F401 - its operators

        try:
            self._program = torch.export.load(path)
        except Exception as error:
            raise ArtifactError(f"load: torch cannot load {path}: {error}. Export again.") from error
        self._module = self._program.module()

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import numpy as np
        import torch

        given = [torch.from_numpy(np.asarray(value, order="C")).cuda() for value in inputs.values()]
        output = self._module(*given)
        values = output if isinstance(output, (tuple, list)) else (output,)
        return {"output": values[0].cpu().numpy()}
