"""Run a serialized engine: TensorRT's own runtime, torch for the buffers on the GPU."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3x.errors import ArtifactError, Step, TargetUnavailableError

if TYPE_CHECKING:
    import numpy as np


def tensorrt() -> Any:
    """The ``tensorrt`` module of whichever distribution is installed, without Torch-TensorRT."""
    for name in ("tensorrt_rtx", "tensorrt"):
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise TargetUnavailableError(
        "running an engine needs TensorRT", remedy='Install it: pip install "sam3x[trt-rtx]"', step=Step.LOAD
    )


class EngineRunner:
    """Named arrays to the GPU, one execution, named arrays back.

    Raises:
        TargetUnavailableError: no TensorRT, or no GPU.
        ArtifactError: TensorRT cannot read the engine, or it is for another GPU.
    """

    def __init__(self, path: Path) -> None:
        trt = tensorrt()
        import torch

        if not torch.cuda.is_available():
            raise TargetUnavailableError(
                f"{path.name} runs on a GPU, and there is none here",
                remedy="On a GPU machine: sam3x verify FOLDER",
                step=Step.LOAD,
            )
        self._trt = trt
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            name = torch.cuda.get_device_name()
            raise ArtifactError(
                f"TensorRT cannot load {path} on {name}", remedy="Export again for this GPU (--compute-capability)."
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise ArtifactError(f"TensorRT cannot prepare {path} to run", remedy="Run again with sam3x -v for what it says.")
        self._names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import numpy as np
        import torch

        held: dict[str, torch.Tensor] = {}
        outputs = []
        for name in self._names:
            if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT:
                held[name] = torch.from_numpy(np.asarray(inputs[name], order="C")).cuda()
                self._context.set_input_shape(name, tuple(held[name].shape))
            else:
                outputs.append(name)
        for name in outputs:
            dtype = getattr(
                torch, str(self._engine.get_tensor_dtype(name)).rpartition(".")[2].lower().replace("half", "float16")
            )
            dtype = torch.float32 if dtype is torch.float else dtype
            held[name] = torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=dtype, device="cuda")
        for name, value in held.items():
            self._context.set_tensor_address(name, value.data_ptr())
        stream = torch.cuda.current_stream()
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise ArtifactError(
                "TensorRT could not run the engine",
                remedy=(
                    "Run again with sam3x -v for what it says. An engine with conditionals (--branches cond) may run as "
                    "one with --branches select."
                ),
                step=Step.RUN,
            )
        stream.synchronize()
        return {name: held[name].cpu().numpy() for name in outputs}
