"""Who runs the graph of a .pte: the partitioners of XNNPACK, Core ML and Vulkan, and what each needs to hear."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Node

from sam3x.targets.executorch.metadata import flops_of
from sam3x.targets.executorch.partition import partitions

PLACE = "sam3x_place"
"""In a node's ``meta``: where it stood in the graph before delegates were cut out of it."""

_LIGHT = 1_000_000
"""FLOPs that are no reason for a delegate of their own; ExecuTorch's kernels need about a millisecond for them."""


def _too_dynamic(node: Node) -> bool:
    """Whether a squeeze leaves more than one size to the run; XNNPACK's reshape, which it becomes, infers one."""
    if "squeeze" not in str(node.target):
        return False
    return sum(not isinstance(size, int) for size in node.meta["val"].shape) > 1


def _slices_rows(node: Node) -> bool:
    """Whether a slice takes a known part of one dimension, of a float tensor with other sizes that a run decides."""
    if "slice_copy" not in str(node.target):
        return False
    source, made = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    dim = node.args[1] if len(node.args) > 1 else 0
    known = isinstance(source.shape[dim], int) and isinstance(made.shape[dim], int)
    return bool(known and made.dim() == 3 and made.is_floating_point() and (len(node.args) < 5 or node.args[4] == 1))


@contextlib.contextmanager
def dynamic_slices() -> Iterator[None]:
    """XNNPACK's slice takes all of a dimension whose size is written as 0, which ExecuTorch's serializer never does.

    A part of the rows of a dynamic number of images is then a slice like any other.
    """
    from executorch.backends.xnnpack.operators import node_visitor

    # the package's own import fills it
    known, target = node_visitor._node_visitor_dict, "aten.slice_copy.Tensor"
    original = known[target]

    class OfAnySize(original):  # type: ignore[misc, valid-type]
        def define_node(self, node: Node, xnn_graph: Any, vals_to_ids: Any, debug_handle: int) -> None:
            super().define_node(node, xnn_graph, vals_to_ids, debug_handle)
            sizes = xnn_graph.xnodes[-1].xnode_union.sizes
            for dim, size in enumerate(node.meta["val"].shape):
                if not isinstance(size, int):
                    sizes[dim] = 0

    known[target] = OfAnySize
    try:
        yield
    finally:
        known[target] = original


def partitioners(delegate: str, precision: str) -> list[Any]:
    """ExecuTorch's partitioner for a delegate, none for the portable kernels.

    Args:
        precision: what a delegate of its own kind of numbers computes in; XNNPACK takes the graph's.
    """
    return {"xnnpack": _xnnpack, "coreml": _coreml, "vulkan": _vulkan}[delegate](precision) if delegate != "none" else []


def _coreml(precision: str) -> list[Any]:
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition.coreml_partitioner import CoreMLPartitioner

    specs = CoreMLBackend.generate_compile_specs(
        compute_precision=coremltools.precision.FLOAT16 if precision == "fp16" else coremltools.precision.FLOAT32,
        minimum_deployment_target=coremltools.target.iOS17,
    )
    return [CoreMLPartitioner(compile_specs=specs)]


def _vulkan(precision: str) -> list[Any]:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return [VulkanPartitioner({"require_dynamic_shapes": True, "force_fp16": precision == "fp16"})]


def _xnnpack(precision: str) -> list[Any]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from torch.fx.passes.infra.partitioner import Partition

    class LegalPartitioner(XnnpackPartitioner):
        """XNNPACK's, with delegates that are worth their start."""

        def get_matched_nodes_from_configs(self, ep: ExportedProgram) -> list[list[Node]]:
            """Less the squeezes that its configuration takes and its serializer then refuses, with slices of rows."""
            found = [group for group in super().get_matched_nodes_from_configs(ep) if not any(map(_too_dynamic, group))]
            taken = {node for group in found for node in group}
            return [*found, *([node] for node in ep.graph.nodes if node not in taken and _slices_rows(node))]

        def generate_partitions(self, ep: ExportedProgram) -> list[Any]:
            groups = self.get_matched_nodes_from_configs(ep)
            whole = sum(flops_of(node) for group in groups for node in group)
            for index, node in enumerate(ep.graph.nodes):
                node.meta[PLACE] = index

            def light(program: Sequence[Node]) -> bool:
                kept = any("linear" in str(node.target) for node in program)  # it would have to be decomposed by now
                return not kept and sum(map(flops_of, program)) < min(_LIGHT, whole / 1000)

            found = partitions(ep.graph, groups, light)
            return [Partition(id=index, nodes=nodes) for index, nodes in enumerate(found)]

    return [LegalPartitioner()]
