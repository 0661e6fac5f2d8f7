"""Group norm as means over the parts of a group."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import aten, dtype_of, shape_of
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.node_pass import NodePass


class DecomposeGroupNormPass(NodePass):
    """``aten.native_group_norm`` → mean, difference, mean of squares, reciprocal root, weight and bias.

    coremltools asks that the number of pictures is a number.
    """

    name = "decompose_group_norm"
    operators = (aten.native_group_norm.default,)

    def matches(self, node: Node) -> bool:
        """Whether it is the first result of a group norm."""
        norm, index = node.args if node.target is operator.getitem else (None, None)
        return isinstance(norm, Node) and bool(index == 0) and super().matches(norm)

    def rewrite(self, emit: Emitter, node: Node) -> Node:
        norm = node.args[0]
        assert isinstance(norm, Node)
        x, weight, bias, _, channels, _, groups, eps = norm.args
        sizes = shape_of(x)
        if dtype_of(x) is not torch.float32 or not all(isinstance(size, int) for size in sizes[1:]):
            raise NoMatchError("not float32, or of a size that only a run tells")
        inner = [channels // groups, *sizes[2:]]
        over, ones = list(range(2, 2 + len(inner))), [1] * (len(sizes) - 2)
        parts = emit(aten.reshape.default, x, [-1, groups, *inner])
        centred = emit(aten.sub.Tensor, parts, emit(aten.mean.dim, parts, over, True))
        variance = emit(aten.mean.dim, emit(aten.mul.Tensor, centred, centred), over, True)
        root = emit(aten.rsqrt.default, emit(aten.add.Tensor, variance, eps))
        result = emit(aten.reshape.default, emit(aten.mul.Tensor, centred, root), [-1, *sizes[1:]])
        for operator_, own in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
            if own is not None:
                result = emit(operator_, result, emit(aten.reshape.default, own, [channels, *ones]))
        return result
