"""Lowering to a .pte: sizes bounded, the graph delegated, memory planned."""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node
from torch.utils._sympy.value_ranges import ValueRanges

from sam3x.capture.program import CapturedProgram
from sam3x.passes.attention.split_scores import SplitScoresPass
from sam3x.passes.cleanup.unify_dimensions import UnifyDimensionsPass
from sam3x.passes.graph.emitter import fake_mode_of
from sam3x.passes.pipeline import PassPipeline
from sam3x.targets.executorch.delegates import PLACE, dynamic_slices, partitioners
from sam3x.targets.executorch.metadata import metadata_of
from sam3x.targets.executorch.retraces import NodeByNodeProgram, names_memory_format, passes_with_work
from sam3x.targets.quiet import suppressed_output


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
                low, high = captured.ranges[meaning]
                bounds = ValueRanges(min(max(low, int(known.lower)), high), high)
                env.var_to_range[symbol] = bounds
                captured.program.range_constraints[symbol] = bounds
        yield
    finally:
        env.var_to_range.clear()
        env.var_to_range.update(before)
        captured.program.range_constraints.clear()
        captured.program.range_constraints.update(constraints)


def _sorted(module: GraphModule) -> GraphModule:
    """Sort the graph by the places that the partitioner gave; what was cut out, and all it waits for, comes first."""
    from torch.fx.passes.tools_common import stable_topological_sort

    first: set[Node] = set()
    waiting = [node for node in module.graph.nodes if node.op == "call_module"]
    waiting += [user for node in waiting for user in node.users if user.target is operator.getitem]
    while waiting:
        node = waiting.pop()
        if node not in first:
            first.add(node)
            waiting += node.all_input_nodes

    def place(node: Node) -> tuple[int, bool, int]:
        if node.op in ("placeholder", "output"):
            return (0 if node.op == "placeholder" else 2, False, 0)
        return (1, node not in first, node.meta.get(PLACE, -1))

    last = module.graph._root
    for node in sorted(module.graph.nodes, key=place):
        last.append(node)
        last = node
    return stable_topological_sort(module)


@contextlib.contextmanager
def _graph_order() -> Iterator[None]:
    """Nodes keep their order when a delegate is cut out.

    ExecuTorch sorts what is left breadth first (``legalize_graph``), and a second delegate then computes the scores of all
    heads before it uses those of the first. ``_sorted`` stands in for it.
    """
    from executorch.exir import lowered_backend_module

    before = lowered_backend_module.legalize_graph
    lowered_backend_module.legalize_graph = _sorted
    try:
        yield
    finally:
        lowered_backend_module.legalize_graph = before


@torch.no_grad()
def write(captured: CapturedProgram, path: Path, delegate: str, precision: str, contract: str) -> dict[str, Any]:
    """Lower ``captured`` and write ``path``; returns the metadata of the lowered graph.

    Args:
        delegate, precision: see ``partitioners``. contract: the method that returns the names of inputs and outputs as JSON.
    """
    with suppressed_output():
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass

    split = SplitScoresPass(captured.dim_names, captured.ranges)
    passes = (UnifyDimensionsPass(captured.dim_names), *((split,) if delegate == "xnnpack" else ()))
    captured, _ = PassPipeline(passes).run(captured)
    names = {"inputs": captured.input_names, "outputs": captured.output_names}
    own = delegate == "xnnpack"
    # the dispatcher: its retraces otherwise make numbers of sizes, as ``emitter.quietly`` says
    with (
        enable_python_dispatcher(),
        _bounded(captured),
        _graph_order(),
        dynamic_slices(),
        passes_with_work(),
        suppressed_output(),
    ):
        program = NodeByNodeProgram.of(captured.program) if own else captured.program
        edge = to_edge_transform_and_lower(
            program,
            partitioner=partitioners(delegate, precision),
            constant_methods={contract: json.dumps(names)},
            compile_config=EdgeCompileConfig(
                _check_ir_validity=False, _skip_dim_order=own and not names_memory_format(captured.program)
            ),
        )
        metadata = metadata_of(edge.exported_program().graph_module)
        # inputs are read where the caller has them, no copy and no room in the arena, unless one is an output too: ExecuTorch
        # gives outputs memory of their own, and such an input would lose what it holds
        through = any(node.op == "placeholder" for node in captured.program.graph.output_node().all_input_nodes)
        config = ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(alloc_graph_input=through))
        lowered = edge.to_executorch(config)
    with path.open("wb") as stream:
        lowered.write_to_file(stream)
    plan = next(item for item in lowered.executorch_program.execution_plan if item.name == "forward")
    return {**metadata, "planned_bytes": sum(plan.non_const_buffer_sizes)}
