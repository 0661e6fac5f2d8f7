"""What a component gives stays on the provider's device, for the component that reads it next (ONNX Runtime's IO binding)."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DEVICES = {
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "cuda",
    "NvTensorRTRTXExecutionProvider": "cuda",
    "DmlExecutionProvider": "dml",
    "CANNExecutionProvider": "cann",
}
"""Providers with memory of their own that ONNX Runtime binds → its name there."""


class DeviceMemory:
    """Runs sessions that share a device: arrays come back to numpy, and their copies on the device are read in their place.

    An array that has a copy is read-only; the copy goes when the array does.
    """

    def __init__(self, device: str, number: int = 0) -> None:
        self.device, self.number = device, number
        self._copies: dict[tuple[Any, ...], Any] = {}

    def run(self, session: Any, outputs: Sequence[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The arrays of ``outputs``, in order."""
        binding = session.io_binding()
        known = {item.name for item in session.get_inputs()}
        for name, array in inputs.items():
            if name in known:
                binding.bind_ortvalue_input(name, self._copies.get(_place(array)) or self._uploaded(array))
        for name in outputs:
            binding.bind_output(name, self.device, self.number)
        session.run_with_iobinding(binding)
        return [self._downloaded(value) for value in binding.get_outputs()]

    def _uploaded(self, array: np.ndarray) -> Any:
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, self.number)

    def _downloaded(self, value: Any) -> np.ndarray:
        array: np.ndarray = value.numpy().copy()
        array.flags.writeable = False
        key = _place(array)
        self._copies[key] = value
        weakref.finalize(array, self._copies.pop, key, None)
        return array


def _place(array: np.ndarray) -> tuple[Any, ...]:
    """The memory that an array shows, and how; a view of all of it is as good."""
    return array.ctypes.data, array.shape, array.strides, array.dtype


def memory_of(providers: Sequence[Any]) -> DeviceMemory | None:
    """That of the provider that is preferred; None where it works in the host's memory."""
    if not providers:
        return None
    name, options = providers[0] if isinstance(providers[0], tuple) else (providers[0], {})
    device = DEVICES.get(name)
    return None if device is None else DeviceMemory(device, int(options.get("device_id", 0)))
