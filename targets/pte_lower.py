"""Lowering to a .pte: sizes bounded, the graph delegated, memory planned."""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils._sympy.value_ranges import ValueRanges

from sam3x.passes.base import Pass, PassResult
from sam3x.passes.canonicalize_layouts import unify_sizes
from sam3x.passes.cond_graph import aten, expression, fake_mode_of, slice_args
from sam3x.passes.pipeline import PassPipeline
from sam3x.program import CapturedProgram
from sam3x.targets.pte_facts import facts_of
from sam3x.targets.quiet import errors_only


class UnifyDimensionsPass(Pass):
    """One symbol for each dynamic dimension, whatever input it stands in; no slice of all of it, nothing computed twice.

    That inputs agree on the batch is the contract of the artifact, which the graph alone does not say.
    """

    name = "unify_dimensions"

    def __init__(self, captured: CapturedProgram) -> None:
        self.meanings = dict(captured.dim_names)

    def call(self, program: ExportedProgram) -> PassResult:
        module = program.graph_module
        symbols = {
            str(symbol): symbol
            for node in module.graph.nodes
            if isinstance(node.meta.get("val"), torch.Tensor)
            for size in node.meta["val"].shape
            for symbol in expression(size).free_symbols
        }
        first: dict[str, Any] = {}
        same = {}
        for name, meaning in self.meanings.items():
            if name in symbols and first.setdefault(meaning, symbols[name]) is not symbols[name]:
                same[symbols[name]] = first[meaning]
        rewrites = unify_sizes(module, same)
        sizes = {
            expression(size): (node, dim)
            for node in reversed(module.graph.nodes)
            if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)
            for dim, size in enumerate(node.meta["val"].shape)
        }
        for node in list(module.graph.nodes):
            if node.target is aten.slice.Tensor:
                source, dim, start, _, step = slice_args(node)
                whole = expression(source.meta["val"].shape[dim]) == expression(node.meta["val"].shape[dim])
                if whole and start in (0, None) and step == 1:
                    node.replace_all_uses_with(source)
                    rewrites += 1
            elif node.target in (aten.clone.default, aten.alias.default, aten.detach.default):
                node.replace_all_uses_with(node.args[0])
                rewrites += 1
            elif node.target is aten.sym_size.int and expression(node.meta["val"]) in sizes:
                node.args = sizes[expression(node.meta["val"])]
        module.graph.eliminate_dead_code()
        rewrites += _share(module)
        return PassResult(program=program, modified=bool(rewrites), rewrites=rewrites)


def _share(module: GraphModule) -> int:
    """One node for what is computed twice, as every layer computes its masks; returns how many went."""
    known: dict[Any, Node] = {}
    gone = 0
    for node in list(module.graph.nodes):
        target: Any = node.target
        sizes = target in (operator.floordiv, operator.mul)
        pure = sizes or (isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable)
        if node.op != "call_function" or not pure or torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            continue
        key = (target, repr(node.args), repr(node.kwargs))
        if known.setdefault(key, node) is not node:
            node.replace_all_uses_with(known[key])
            module.graph.erase_node(node)
            gone += 1
    return gone


@contextlib.contextmanager
def _bounded(captured: CapturedProgram) -> Iterator[None]:
    """Upper ends of the dynamic sizes, from which ExecuTorch plans memory; taken back afterwards."""
    env = fake_mode_of(captured.program.graph_module).shape_env
    if env is None:
        yield
        return
    before = dict(env.var_to_range)
    constraints = dict(captured.program.range_constraints)
    try:
        for symbol, known in before.items():
            meaning = captured.dim_names.get(str(symbol))
            if meaning is not None:
                low, high = getattr(captured.spec, meaning)
                bounds = ValueRanges(min(max(low, int(known.lower)), high), high)
                env.var_to_range[symbol] = bounds
                captured.program.range_constraints[symbol] = bounds
        yield
    finally:
        env.var_to_range.clear()
        env.var_to_range.update(before)
        captured.program.range_constraints.clear()
        captured.program.range_constraints.update(constraints)


def write(captured: CapturedProgram, path: Path, delegate: str, contract: str) -> dict[str, Any]:
    """Lower ``captured`` and write ``path``; returns the facts of the lowered graph.

    Args:
        delegate: see ``partitioners``. contract: name of the method that returns the names of inputs and outputs as JSON.
    """
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    captured, _ = PassPipeline((UnifyDimensionsPass(captured),)).run(captured)
    names = {"inputs": captured.input_names, "outputs": captured.output_names}
    plain = _is_plain(captured.program)
    with torch.no_grad(), _bounded(captured), errors_only("torch.utils._pytree", "root", "executorch"):
        edge = to_edge_transform_and_lower(
            PlainProgram.of(captured.program) if plain else captured.program,
            partitioner=partitioners(delegate, plain=plain),
            constant_methods={contract: json.dumps(names)},
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        facts = facts_of(edge.exported_program().graph_module)
        # inputs are read where the caller has them, no copy and no room in the arena, unless one is an output too: ExecuTorch
        # gives outputs memory of their own, and such an input would lose what it holds
        through = any(node.op == "placeholder" for node in captured.program.graph.output_node().all_input_nodes)
        config = ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(alloc_graph_input=through))
        lowered = edge.to_executorch(config)
    with path.open("wb") as stream:
        lowered.write_to_file(stream)
    plan = next(item for item in lowered.executorch_program.execution_plan if item.name == "forward")
    return {**facts, "planned_bytes": sum(plan.non_const_buffer_sizes)}


_CAT = 5
"""The most tensors XNNPACK joins at once."""

_PLAIN = {
    *(aten.linear.default, aten.bmm.default, aten._softmax.default, aten.permute.default, aten.relu.default, aten.gelu.default),
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.rsqrt.default, aten.reshape.default, aten.where.self),
    *(aten.full.default, aten.full_like.default, aten.scalar_tensor.default, aten.arange.start_step, aten.any.dim),
    *(aten.gt.Scalar, aten.lt.Scalar, aten.logical_not.default, aten.logical_and.default, aten.logical_or.default),
    *(aten.sym_size.int, aten.select.int, operator.floordiv, operator.mul, operator.getitem),
}
_QUANTIZED = {"choose_qparams", "quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel"}
"""PT2E's operators, which exist once torchao is imported."""


def _is_plain(program: ExportedProgram) -> bool:
    """Whether XNNPACK's graph passes have nothing to do: every operator is one they leave as it is."""

    def plain(node: Node) -> bool:
        if node.target is aten.cat.default:
            return len(node.args[0]) <= _CAT  # type: ignore[arg-type]
        if node.target is aten._to_copy.default:
            return node.meta["val"].dtype is not node.args[0].meta["val"].dtype  # type: ignore[union-attr]
        namespace, _, name = getattr(getattr(node.target, "_schema", None), "name", "").partition("::")
        return node.target in _PLAIN or (namespace == "quantized_decomposed" and name in _QUANTIZED)

    return all(plain(node) for node in program.graph.nodes if node.op == "call_function")


class PlainProgram(ExportedProgram):
    """A program of ``_PLAIN`` operators: asked to decompose, it returns itself instead of retracing a graph that stays the same."""

    @classmethod
    def of(cls, program: ExportedProgram) -> PlainProgram:
        """``program``, which is consumed, with the one composite operator that edge programs have another word for."""
        for node in program.graph.nodes:
            if node.target is aten.reshape.default:
                node.target = aten.view.default  # edge programs copy at every view, so that each source is contiguous
        names = ("graph_signature", "state_dict", "range_constraints", "module_call_graph", "example_inputs", "constants")
        given = {name: getattr(program, name) for name in (*names, "verifiers")}
        return cls(root=program.graph_module, graph=program.graph, **given)

    def run_decompositions(self, decomp_table: Any = None, *args: Any, **kwargs: Any) -> ExportedProgram:
        return self


def _convex(graph: Graph, nodes: set[Node]) -> bool:
    """Whether no node outside lies on a way from one inside to another."""
    after: set[Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node in nodes:
            if not after.isdisjoint(sources):
                return False
        elif not nodes.isdisjoint(sources) or not after.isdisjoint(sources):
            after.add(node)
    return True


def partitioners(delegate: str, *, plain: bool) -> list[Any]:
    """ExecuTorch's partitioner for a delegate, none for the portable kernels.

    Args:
        plain: leave out XNNPACK's own graph passes (for convolutions, batch norms, long concatenations, copies), which retrace
            the graph seventeen times; ``_is_plain`` says when they have nothing to do.
    """
    if delegate == "none":
        return []
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec
    from torch.fx.passes.infra.partitioner import Partition

    class LegalPartitioner(XnnpackPartitioner):
        """XNNPACK's, less what would only retrace a graph that is legal already: two thirds of the time."""

        def __init__(self) -> None:
            super().__init__()
            if plain:  # XNNPACK's name for "the first pass is enough"
                specs = [CompileSpec("dqlinear_partitioner", b"")]
                self.delegation_spec = DelegationSpec("XnnpackBackend", specs)

        def generate_partitions(self, ep: ExportedProgram) -> list[Any]:
            """All of it in one where that is possible; the search for groups that may merge stops short of it, and is slow."""
            nodes = [node for group in self.get_matched_nodes_from_configs(ep) for node in group]
            return [Partition(id=0, nodes=nodes)] if nodes and _convex(ep.graph, set(nodes)) else super().generate_partitions(ep)

        def ops_to_not_decompose(self, ep: ExportedProgram) -> Any:
            ops, check = super().ops_to_not_decompose(ep)
            if not plain:
                return ops, check
            if ep.dialect == "ATEN":
                ops = [*ops, aten.sym_size.int]  # it has no decomposition, and counts as one
            return ops, None  # every linear is XNNPACK's: none is tried and put back

    return [LegalPartitioner()]
