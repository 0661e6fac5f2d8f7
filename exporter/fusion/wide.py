"""Code that asks for float32, run in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


class wide_floats(TorchFunctionMode):
    """Within it float32 that code asks for, or holds, is float64, and complex64 complex128, in this thread alone.

    So ``softmax(dtype=torch.float32)``, ``x.float()``, ``one_hot(…).float()`` and tables made on the way take part in a
    float64 run. Tensors that an operator writes into stay what they are.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):  # .shape, .dtype, .data
            return func(*args, **kwargs)
        if name == "float":
            func, args = torch.Tensor.to, (args[0], torch.float64)
        written = args[:1] if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) else ()
        args = (*written, *tree_map(_wider, tuple(args[len(written) :])))
        options = {key: value if key == "out" else tree_map(_wider, value) for key, value in kwargs.items()}
        return tree_map(_made, func(*args, **options))


def _wider(value: Any) -> Any:
    if isinstance(value, Tensor):
        wanted = _WIDER.get(value.dtype)
        return value if wanted is None else value.to(wanted)
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def _made(value: Any) -> Any:
    """A result: what a factory made of torch's default float is float64 too; a view of a tensor is left to its next reader."""
    if (
        isinstance(value, Tensor)
        and value.dtype in _WIDER
        and not value._is_view()
        and not isinstance(value, torch.nn.Parameter)
    ):
        return value.to(_WIDER[value.dtype])
    return value
