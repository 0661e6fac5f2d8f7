"""The common case of a pass: one node at a time, wherever one of its operators is called."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Node

from sam3x.capture.program import erase_dead
from sam3x.passes.base import MatchFailure, NoMatchError, Pass, PassResult, graph_modules, path_of
from sam3x.passes.graph.emitter import Emitter


class NodePass(Pass):
    """A pass that is its rewrite and nothing else: every graph is walked, and what nobody reads any more is dropped.

    Attributes:
        operators: whose nodes are rewritten.
    """

    operators: tuple[Any, ...] = ()

    def matches(self, node: Node) -> bool:
        """Whether ``rewrite`` is asked about ``node``."""
        return node.op == "call_function" and node.target in self.operators

    @abstractmethod
    def rewrite(self, emit: Emitter, node: Node) -> Node | None:
        """Return what stands for ``node`` from now on: ``node`` itself where it was changed, None where nothing is to be done.

        Args:
            emit: adds nodes in front of ``node``; they go again where nothing comes of it.

        Raises:
            NoMatchError: the node is left as it is, with a ``MatchFailure`` that says why.
        """

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, failures = 0, []
        for prefix, module in graph_modules(program):
            done = 0
            for node in [node for node in module.graph.nodes if self.matches(node)]:
                emit = Emitter(module, node)
                try:
                    new = self.rewrite(emit, node)
                except NoMatchError as reason:
                    failures.append(MatchFailure(node=path_of(prefix, node), reason=str(reason)))
                    new = None
                if new is None:
                    emit.undo()
                    continue
                if new is not node:
                    node.replace_all_uses_with(new)
                    module.graph.erase_node(node)
                done += 1
            if done:
                erase_dead(module)
            rewrites += done
        return PassResult(rewrites=rewrites, match_failures=tuple(failures))
