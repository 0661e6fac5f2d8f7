"""What a module's code does while it is traced that no graph can hold, and on which line: it becomes the words of a refusal."""

from __future__ import annotations

import contextlib
import linecache
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import sympy
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from sam3x.errors import CaptureError, Sam3xError
from sam3x.sources.adaptations import symbolic_sizes

_MACHINERY = ("torch", "sympy", "sam3x", "contextlib", "functools", "unittest")


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedSize:
    """A dynamic size that became a number. ``where``: the line of the module's code, in words."""

    value: int
    where: str


@dataclass(slots=True)
class Watch:
    """What one trace met, in order. ``autocasts``: lines that compute below float32."""

    fixed: list[FixedSize] = field(default_factory=list)
    autocasts: list[str] = field(default_factory=list)


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    """Note which lines fix a dynamic size or turn autocast on, in this thread."""
    watch, thread = Watch(), threading.get_ident()
    replace, enter = ShapeEnv._set_replacement, torch.autocast.__enter__

    def replaced(self: ShapeEnv, symbol: sympy.Symbol, value: sympy.Expr, *rest: Any) -> None:
        if threading.get_ident() == thread and isinstance(value, sympy.Integer) and (where := _line()) is not None:
            watch.fixed.append(FixedSize(value=int(value), where=where))
        replace(self, symbol, value, *rest)

    def entered(self: torch.autocast) -> Any:
        if threading.get_ident() == thread and self._enabled and self.device == "cpu" and (where := _line()) is not None:
            watch.autocasts.append(where)
        return enter(self)

    with mock.patch.object(ShapeEnv, "_set_replacement", replaced), mock.patch.object(torch.autocast, "__enter__", entered):
        yield watch


def _line() -> str | None:
    """The innermost line of code that is neither torch's nor sam3x's; None where only those are running."""
    frame = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith("sam3x.capture."):
            return None
        if name.partition(".")[0] not in _MACHINERY and not frame.f_code.co_filename.startswith("<"):
            path, number = frame.f_code.co_filename, frame.f_lineno
            code = linecache.getline(path, number).strip()
            return f"line {number} of {path}" + (f" ({code})" if code else "")
        frame = frame.f_back  # type: ignore[assignment]
    return None


def traced(
    module: torch.nn.Module,
    run: Callable[[], ExportedProgram],
    sizes: Mapping[str, int],
    refusal: Callable[[Exception], CaptureError],
) -> ExportedProgram:
    """Trace, and once more with ``int`` left symbolic too where the code made a number of a dynamic size.

    Args:
        module: whose code is run. sizes: dynamic dimension → the size it is traced at. refusal: of any other failure.

    Raises:
        CaptureError: names the line that fixes a size, or that computes below float32.
    """
    failure: Exception
    for numbers in (False, True):
        with watched() as watch:
            try:
                with symbolic_sizes(module, numbers=numbers):
                    program = run()
            except Exception as error:
                failure = error
            else:
                _refuse_low_precision(program, watch)
                return program
        fixed = [(name, item) for item in watch.fixed for name, size in sizes.items() if size == item.value]
        if not fixed:
            break
    if isinstance(failure, Sam3xError):
        raise failure
    if not fixed:
        raise refusal(failure) from failure
    name, item = fixed[0]
    option = f"--{name.replace('_', '-')}"
    raise CaptureError(
        f"'{name}' must stay dynamic, and {item.where} makes a number of it, {item.value} while tracing",
        remedy=f"Compute with tensor.shape there, without a loop or a list as long as it, or fix the size with {option}.",
    ) from failure


def _refuse_low_precision(program: ExportedProgram, watch: Watch) -> None:
    """ONNX Runtime's CPU kernels have no bfloat16, and no rule tells what rounding in the middle may cost."""
    dtypes = {torch.bfloat16, torch.float16} if watch.autocasts else {torch.bfloat16}
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.dtype in dtypes:
                found = f"torch.autocast on {watch.autocasts[0]}" if watch.autocasts else "the module's code"
                raise CaptureError(
                    f"{found} computes in {value.dtype}, and an export computes in float32 until it is told otherwise",
                    remedy="Leave that out of the forward (enabled=False does), and choose the precision with --precision.",
                )
