"""The pass contract: what a graph pass declares, checks and reports.

A pass receives a functional ``ExportedProgram`` (no in-place ops, weights lifted to placeholders, branches as
``torch.ops.higher_order.cond`` over sub-GraphModules) and changes it in place. The pipeline hands it a private copy of the
graph, so a pass that raises loses nothing. Modelled on ``onnx_ir.passes``: pre- and postconditions are checked by the
pipeline, on the result.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram


class Exactness(enum.Enum):
    """What a pass may do to the numbers."""

    BIT_EXACT = "bit-exact"
    ARITHMETIC = "arithmetic"  # reassociates floating point: verified against float64, not against bits


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchFailure:
    """A place where a pass nearly matched, and why it refused. Data for ``sam3x inspect``, never an exception."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    """What one run of a pass did. ``modified`` is true exactly when the graph changed."""

    program: ExportedProgram
    modified: bool
    rewrites: int = 0
    match_failures: tuple[MatchFailure, ...] = ()


class Pass(ABC):
    """One graph transformation.

    Attributes:
        name: id used on the command line and in records, e.g. ``canonicalize_attention``.
        run_after: names of passes that must come earlier when both are in a pipeline.
        exactness: whether results stay bit-equal or only arithmetically equal.
    """

    name: str
    run_after: tuple[str, ...] = ()
    exactness: Exactness = Exactness.BIT_EXACT

    def requires(self, program: ExportedProgram) -> None:  # noqa: B027 - optional hook
        """Raise ``PreconditionError`` when the program cannot be worked on."""

    @abstractmethod
    def call(self, program: ExportedProgram) -> PassResult:
        """Rewrite ``program`` in place (every graph of ``graph_modules(program)``) and report."""

    def ensures(self, result: PassResult) -> None:  # noqa: B027 - optional hook
        """Raise ``PostconditionError`` when the result breaks the promise of this pass."""


def graph_modules(program: ExportedProgram) -> Iterator[tuple[str, torch.fx.GraphModule]]:
    """Yield ``("", root)`` and every branch sub-graph ``("true_graph_0", module)``, outermost first.

    Only modules that some node refers to are yielded: a branch graph no ``cond`` uses any more is dead.
    """

    def walk(prefix: str, module: torch.fx.GraphModule) -> Iterator[tuple[str, torch.fx.GraphModule]]:
        yield prefix, module
        seen: set[str] = set()
        for node in module.graph.nodes:
            if node.op != "get_attr" or node.target in seen or "." in node.target:
                continue
            seen.add(node.target)
            child = getattr(module, node.target, None)
            if isinstance(child, torch.fx.GraphModule):
                yield from walk(f"{prefix}.{node.target}" if prefix else node.target, child)

    yield from walk("", program.graph_module)


def count_ops(program: ExportedProgram) -> dict[str, int]:
    """Count ``call_function`` targets by name over all graphs, branches included."""
    counts: dict[str, int] = {}
    for _, module in graph_modules(program):
        for node in module.graph.nodes:
            if node.op == "call_function":
                name = str(node.target)
                counts[name] = counts.get(name, 0) + 1
    return counts
