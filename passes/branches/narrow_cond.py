"""What both branches do alike moves out of the conditional: function merging by sequence alignment, and tail merging.

The branches are aligned on the nodes that matter (``align``). A pair that corresponds becomes one node outside
(``merge``); where its operands differ, a small conditional in front of it chooses them, and holds no more than what
differs. What follows from values outside follows outside. A size that depends on the branch becomes a symbol, the same one
wherever it is the same size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from sam3x.passes.base import MatchFailure, NoMatchError, Pass, PassResult
from sam3x.passes.branches.align import align, alike
from sam3x.passes.branches.collapse import collapse
from sam3x.passes.branches.merge import Merger
from sam3x.passes.branches.region import MISSING
from sam3x.passes.graph.cond_graph import (
    ASSERTIONS,
    cond_places,
    conds_of,
    is_cond,
    is_heavy,
    outputs,
    own_branches,
    read_cond,
    replace_results,
    sweep,
)


class NarrowCondPass(Pass):
    """Every product, attention and convolution that both branches run stands once, outside; nested conditionals go first.

    A branch's own heavy operators stay inside it. Refused, with the reason: branches with effects, branches with no heavy
    operator in common, and pairs whose place outside would run one branch's heavy operator twice.
    """

    name = "narrow_cond"

    def call(self, program: ExportedProgram) -> PassResult:
        failures: list[MatchFailure] = []
        rewrites = _narrow_all(program.graph_module, "", failures)
        if rewrites:
            sweep(program.graph_module)
            for module, node in [(module, node) for _, module, node in cond_places(program)]:
                collapse(module, node)
            sweep(program.graph_module)
        return PassResult(rewrites=rewrites, match_failures=tuple(failures))


def _narrow_all(module: GraphModule, prefix: str, failures: list[MatchFailure]) -> int:
    rewrites = 0
    for node in conds_of(module):
        name = f"{prefix}{node.name}"
        branches = [str(item.target) for item in node.args[1:3]]
        if any(conds_of(getattr(module, branch)) for branch in branches):
            own_branches(module)
        for branch in branches:
            rewrites += _narrow_all(getattr(module, branch), f"{prefix}{branch}.", failures)
            sweep(getattr(module, branch))
        reason = narrow(module, node)
        if reason is None:
            rewrites += 1
        elif reason:
            failures.append(MatchFailure(node=name, reason=reason))
    return rewrites


def narrow(module: GraphModule, node: Node) -> str | None:
    """Narrow one conditional of ``module``; the reason where it stays as it is, empty where nothing heavy is inside."""
    cond = read_cond(module, node)
    for branch in cond.branches:
        for inner in branch.graph.nodes:
            effect = inner.target in ASSERTIONS or (inner.is_impure() and not is_heavy(inner))
            if inner.op == "call_function" and effect:
                return f"a branch has an effect or draws random numbers ({inner.target})"
    heavy = [{item.target for item in branch.graph.nodes if is_heavy(item) and not is_cond(item)} for branch in cond.branches]
    if not heavy[0] | heavy[1]:
        return ""  # narrow already
    if not heavy[0] & heavy[1]:
        return "the branches have no product, attention or convolution in common"
    if not all(isinstance(value, Node) for branch in cond.branches for value in outputs(branch)):
        return "a branch returns a number that is no tensor"
    merger = Merger(module, cond)
    try:
        results = _Stages(merger).run()
        if not merger.moved:
            raise NoMatchError("no product, attention or convolution works on the same weights in both branches")
    except (NoMatchError, GuardOnDataDependentSymNode) as reason:
        merger.undo()
        return str(reason).partition("\n")[0]
    replace_results(node, results)
    return None


class _Stages:
    """Takes the aligned pairs in order; those ready at the same time share one conditional."""

    def __init__(self, merger: Merger) -> None:
        self.merger = merger
        true, false = (side.branch for side in merger.sides)
        self.left = align(true, false, lambda a, b: merger.free(a, b) is not MISSING)
        self.pending: list[tuple[Node, Node]] = []
        self.wanted: dict[tuple[Any, Any], None] = {}

    def run(self) -> list[Any]:
        while self.left:
            true, false = self.left[0]
            if self.merger.free(true, false) is not MISSING:
                self.left.pop(0)
                continue
            operands = self._operands(true, false)
            if not self._ready(operands):
                self._flush()
                continue
            self.left.pop(0)
            if is_heavy(true) or self._joins_moved(true, false):
                self.pending.append((true, false))
                self._want(operands)
        if self.pending:
            self._flush()
        returned = list(zip(*(outputs(side.branch) for side in self.merger.sides), strict=True))
        self._want(returned)
        self._choose()
        return [self.merger.free(*pair) for pair in returned]

    def _operands(self, true: Node, false: Node) -> list[tuple[Any, Any]]:
        """Pairs of operands that nothing outside stands for yet."""
        values = [item for item in true.all_input_nodes if isinstance(item.meta.get("val"), torch.Tensor)]
        others = [item for item in false.all_input_nodes if isinstance(item.meta.get("val"), torch.Tensor)]
        if len(values) != len(others):
            raise NoMatchError(f"{true.target} takes {len(values)} tensors in one branch and {len(others)} in the other")
        return [pair for pair in zip(values, others, strict=True) if self.merger.free(*pair) is MISSING]

    def _ready(self, operands: list[tuple[Any, Any]]) -> bool:
        """Whether the operands follow from values outside without a node that is still to be moved."""
        waiting = {node for pair in (*self.pending, *self.left) for node in pair}
        for side, values in zip(self.merger.sides, zip(*operands, strict=True), strict=False):
            if any(node in waiting for node in side.cone(values)):
                return False
        return True

    def _joins_moved(self, true: Node, false: Node) -> bool:
        """A cheap node goes along where one of its operands is outside already, and both branches use it more than once."""
        operands = self._operands(true, false)
        return len(operands) < len(true.all_input_nodes) and len(true.users) > 1 and len(false.users) > 1

    def _flush(self) -> None:
        if not self.pending:
            raise NoMatchError("an operand of a pair needs the pair itself")
        self._look_ahead()
        self._choose()
        for pair in self.pending:
            if self.merger.free(*pair) is MISSING:
                raise NoMatchError(f"{pair[0].target} ('{pair[0].name}') needs to know a size that only a run can tell")
        self.pending = []

    def _want(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        self.wanted.update(dict.fromkeys(self._peeled(*pair) for pair in pairs))

    def _peeled(self, true: Any, false: Any) -> tuple[Any, Any]:
        """The pair behind the operators that both branches end with alike: those follow outside (tail merging)."""
        while all(isinstance(node, Node) and node.op == "call_function" for node in (true, false)) and not is_heavy(true):
            if true.target is not false.target or not alike(true, false):
                break
            operands = self._operands(true, false)
            if len(operands) != 1 or self.merger.free(*_sizes_of(true, false)) is MISSING:
                break
            ((true, false),) = operands
        return true, false

    def _choose(self) -> None:
        missing = [pair for pair in self.wanted if self.merger.free(*pair) is MISSING]
        if missing:
            self.merger.choose(missing)
        self.wanted = {}

    def _look_ahead(self) -> None:
        """What a later pair takes and this conditional computes anyway leaves it too, or it would be computed again."""
        for true, false in self.left:
            operands = self._operands(true, false)
            ready = [pair for pair in operands if self._ready([pair])]
            if len(ready) < len(operands) or is_heavy(true):
                self._want(ready)


def _sizes_of(true: Node, false: Node) -> tuple[list[Any], list[Any]]:
    """The arguments that are sizes, of nodes that are alike."""
    found: tuple[list[Any], list[Any]] = ([], [])
    for node, sizes in zip((true, false), found, strict=True):
        sizes += [item for item in node.all_input_nodes if not isinstance(item.meta.get("val"), torch.Tensor)]
    return found if len(found[0]) == len(found[1]) else ([None], [0])
