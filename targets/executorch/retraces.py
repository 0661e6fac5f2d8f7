"""Leave out the traces that change nothing: ExecuTorch and XNNPACK trace a whole graph again for each of some twenty passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from sam3x.capture.decompose import decomposed
from sam3x.passes.graph.aten_nodes import aten

MOST_JOINED = 5
"""The most tensors XNNPACK joins at once."""


class NodeByNodeProgram(ExportedProgram):
    """A program of core ATen that is decomposed further node by node."""

    @classmethod
    def of(cls, program: ExportedProgram) -> NodeByNodeProgram:
        """``program``, which is consumed."""
        for node in program.graph.nodes:
            if node.target is aten.reshape.default:
                node.target = aten.view.default  # edge programs copy at every view, so that each source is contiguous
        names = ("graph_signature", "state_dict", "range_constraints", "module_call_graph", "example_inputs", "constants")
        given = {name: getattr(program, name) for name in (*names, "verifiers")}
        return cls(root=program.graph_module, graph=program.graph, **given)

    def run_decompositions(self, decomp_table: Any = None, *args: Any, **kwargs: Any) -> ExportedProgram:
        table = torch.export.default_decompositions() if decomp_table is None else decomp_table
        return self.of(decomposed(self, dict(table.items())))


def names_memory_format(program: ExportedProgram) -> bool:
    """Whether an operator asks for another order of dimensions in memory than theirs."""
    plain = (None, torch.contiguous_format, torch.preserve_format)
    return any(node.kwargs.get("memory_format") not in plain for node in program.graph.nodes if node.op == "call_function")


def _among(*parts: str) -> Callable[[Node], bool]:
    return lambda node: any(part in node.target.__name__ for part in parts)  # type: ignore[union-attr]


def _joins_many(node: Node) -> bool:
    return _among("aten.cat")(node) and len(node.args[0]) > MOST_JOINED  # type: ignore[arg-type]


def _one_dimensional(node: Node) -> bool:
    return _among("convolution")(node) and node.args[0].meta["val"].dim() == 3  # type: ignore[union-attr]


_WORK: dict[str, Callable[[Node], bool]] = {
    "DimOrderOpsRevertPass": _among("dim_order"),
    "ConvertToUpsampleBilinear2d": _among("index", "upsample"),
    "PropagateCustomMetaPass": lambda node: "custom" in node.meta,
    "ConvertToSDPAPass": _among("expand_copy"),  # torch's own decomposition has one, the passes' has none
    "ConstPropPass": lambda node: not node.all_input_nodes,
    "FuseBatchNormPass": _among("batch_norm"),
    "DecomposeBatchNorm": _among("batch_norm"),
    "FuseActivationPass": _among("relu", "hardtanh"),
    "DecomposeConcatenate": _joins_many,
    "RemoveGetItemPass": _among("max_pool2d", "max.dim"),
    "InsertPadQDQPass": _among("constant_pad"),
    "Conv1dUnsqueezePass": _one_dimensional,
    "PReLUReshapePass": _among("prelu"),
    "ChannelsLastTaggedReshapePass": _among("convolution", "upsample", "mean", "pool2d", "amax", "max.dim", "prelu"),
    "RemoveRedundantCopyPass": _among("_to_copy"),
}
"""XNNPACK's graph pass → whether it may change something where a node stands. Those that are not named always run."""


def has_work(name: str, program: ExportedProgram) -> bool:
    """Whether XNNPACK's pass of that name may change anything of a delegate's graph."""
    test = _WORK.get(name)
    return test is None or any(test(node) for node in program.graph.nodes if node.op == "call_function")


@contextlib.contextmanager
def passes_with_work() -> Iterator[None]:
    """XNNPACK runs those of its graph passes that have something to do."""
    from executorch.backends.xnnpack import _passes

    run = _passes._transform

    def transform(program: ExportedProgram, given: Any) -> ExportedProgram:
        return run(program, given) if has_work(type(given).__name__, program) else program

    _passes._transform = transform
    try:
        yield
    finally:
        _passes._transform = run
