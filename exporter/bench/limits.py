"""Bound the threads of a runtime that has no setting outside the process."""

from __future__ import annotations

from typing import Any


def limit_onnxruntime(threads: int) -> None:
    """Sessions that say nothing about threads get this many; ONNX Runtime reads no environment variable for it."""
    import onnxruntime

    made = onnxruntime.SessionOptions

    def limited() -> Any:
        options = made()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        return options

    onnxruntime.SessionOptions = limited


def limit_executorch(threads: int) -> None:
    """The pool that XNNPACK and the kernels share; it has no setting outside the process."""
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(threads)
