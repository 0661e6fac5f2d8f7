"""The pass contract: what a graph pass declares, checks and reports.

Every pass works in place: it receives a functional ``ExportedProgram`` (no in-place ops, weights lifted to placeholders,
branches as ``torch.ops.higher_order.cond`` over sub-GraphModules) and changes that program. The pipeline hands it a private
copy of the graphs, so a pass that raises loses nothing, checks the result, and lets the signature name the new outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchFailure:
    """A place where a pass nearly matched, and why it refused. Data for ``sam3x inspect``, never an exception."""

    node: str
    reason: str


class NoMatchError(Exception):
    """Why a place is left alone; becomes a ``MatchFailure``. ``depth`` orders reasons by how close the match came."""

    def __init__(self, reason: str, depth: int = 0) -> None:
        super().__init__(reason)
        self.depth = depth


@dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    """What one run of a pass did.

    Attributes:
        rewrites: places that it rewrote.
        match_failures: places that it left alone.
        tidied: whether it changed the graph elsewhere too: dropped what nobody reads, gave equal sizes one symbol.
    """

    rewrites: int = 0
    match_failures: tuple[MatchFailure, ...] = ()
    tidied: bool = False

    @property
    def modified(self) -> bool:
        """Whether the graph changed."""
        return self.rewrites > 0 or self.tidied


class Pass(ABC):
    """One graph transformation.

    Attributes:
        name: id used on the command line and in records, e.g. ``canonicalize_attention``.
        run_after: names of passes that must come earlier when both are in a pipeline.
    """

    name: str
    run_after: tuple[str, ...] = ()

    def requires(self, program: ExportedProgram) -> None:  # noqa: B027 - optional hook
        """Raise ``PreconditionError`` when the program cannot be worked on."""

    @abstractmethod
    def call(self, program: ExportedProgram) -> PassResult:
        """Rewrite ``program`` in place (every graph of ``graph_modules(program)``) and report."""


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


def path_of(prefix: str, node: torch.fx.Node) -> str:
    """The name of a node with the branches that it stands in: ``true_graph_0.linear_2``."""
    return f"{prefix}.{node.name}" if prefix else node.name


def count_ops(program: ExportedProgram) -> dict[str, int]:
    """Count ``call_function`` targets by name over all graphs, branches included."""
    counts: dict[str, int] = {}
    for _, module in graph_modules(program):
        for node in module.graph.nodes:
            if node.op == "call_function":
                name = str(node.target)
                counts[name] = counts.get(name, 0) + 1
    return counts
