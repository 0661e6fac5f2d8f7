"""RoIAlign as two matrix products, for back ends that have no such operator."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import aten, dtype_of, same_size, shape_of
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.node_pass import NodePass

_ROI_ALIGN = "torchvision.roi_align.default"  # by name: torchvision need not be installed
_NAMES = ("input", "rois", "spatial_scale", "pooled_height", "pooled_width", "sampling_ratio", "aligned")
_NEAR = 6
"""The most samples of one bin that can reach one row when their number follows the box: they lie more than half a row apart."""


class DecomposeRoiAlignPass(NodePass):
    """``torchvision.roi_align`` → ``Wy @ picture @ Wxᵀ`` for each box, after torchvision's CPU kernel.

    input (N, C, H, W) and rois (K, 5: index of the picture, x1, y1, x2, y2) give (K, C, P, Q). The samples of a bin are a grid,
    the weights of a bilinear sample are a product of one for its row and one for its column, and so is the rule that a sample
    outside [-1, size] is 0. So the average is exactly a product with Wy (P, H) and with Wx (Q, W).

    With ``sampling_ratio`` ≤ 0 a bin of height b has ceil(b) samples, as many as the box asks for. For each row the pass looks
    at the six that may reach it, found from the row's place, so boxes of any size, also far outside the picture, get every
    sample. A coordinate that is NaN is inside nothing and its samples are 0, as in torchvision's newest kernel. An
    ``aligned`` box with a side turned over has no samples and gives 0; torchvision raises where it is one side alone.
    A value of the picture that is not finite reaches every bin of its boxes, not only those that sample it.

    Weights are computed in float32 or wider. One picture is multiplied with the rows of all boxes at once; of several, each
    box gets a copy of its own, chosen by ``index_select``. The largest value made is (K, P, W, C), or those copies.
    """

    name = "decompose_roi_align"

    def matches(self, node: Node) -> bool:
        return str(node.target) == _ROI_ALIGN

    def rewrite(self, emit: Emitter, node: Node) -> Node:
        given: dict[str, Any] = {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
        if not all(isinstance(given[name], (int, float)) for name in _NAMES[2:]):
            raise NoMatchError("its bins, its scale or its samples are not fixed")
        if min(given["pooled_height"], given["pooled_width"]) <= 0:
            raise NoMatchError("it has no bins")
        return _decompose(emit, **given)


def _decompose(
    emit: Emitter,
    input: Node,
    rois: Node,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Node:
    """The node that gives (K, C, P, Q)."""
    axis = _Axis(emit, rois, spatial_scale, sampling_ratio, aligned)
    channels, height, width = (emit.dim(input, dim) for dim in (1, 2, 3))
    rows = emit.cast(axis.weights(2, pooled_height, height), dtype_of(input))
    columns = emit.cast(axis.weights(1, pooled_width, width), dtype_of(input))
    picture, pictures = emit.permute(input, [0, 2, 3, 1]), -1
    if same_size(shape_of(input)[0], 1):  # every box is of this picture: one product for the rows of all
        rows, pictures = emit(aten.reshape.default, rows, [1, -1, height]), 1
    else:
        index = emit(aten._to_copy.default, emit(aten.select.int, rois, 1, 0), dtype=torch.int64)
        picture = emit(aten.index_select.default, picture, 0, index)
    picture = emit(aten.reshape.default, picture, [pictures, height, _product(emit, width, channels)])
    pooled = emit(aten.reshape.default, emit(aten.bmm.default, rows, picture), [-1, width, channels])
    columns = emit(aten.expand.default, emit(aten.unsqueeze.default, columns, 1), [-1, pooled_height, -1, -1])
    columns = emit(aten.reshape.default, columns, [-1, pooled_width, width])
    pooled = emit(aten.bmm.default, columns, pooled)
    pooled = emit(aten.reshape.default, pooled, [-1, pooled_height, pooled_width, channels])
    return emit(aten.permute.default, pooled, [0, 3, 1, 2])


def _product(emit: Emitter, left: Any, right: Any) -> Any:
    return left * right if isinstance(left, int) and isinstance(right, int) else emit(operator.mul, left, right)


class _Axis:
    """Where the samples of every box lie along one axis of the picture, and what each row there adds to each bin."""

    def __init__(self, emit: Emitter, rois: Node, scale: float, ratio: int, aligned: bool) -> None:
        self.emit, self.scale, self.ratio, self.aligned = emit, scale, ratio, aligned
        self.dtype = torch.promote_types(dtype_of(rois), torch.float32)
        self.rois, self.device = emit.cast(rois, self.dtype), rois.meta["val"].device

    def weights(self, column: int, bins: int, size: Any) -> Node:
        """(K, bins, size), in the order of torchvision's sums. Inside, tensors are (K, bins, size, samples) or broadcast to it.

        Args:
            column: of the corner in rois, 1 for x, 2 for y; the opposite one is two further. size: rows of the picture.
        """
        emit = self.emit
        start, end = self._corner(column), self._corner(column + 2)
        extent = emit(aten.sub.Tensor, end, start)
        if not self.aligned:
            extent = emit(aten.clamp.default, extent, 1.0)
        height = emit(aten.div.Tensor, extent, float(bins))
        begin = emit(aten.add.Tensor, start, emit(aten.mul.Tensor, self._range(bins, [-1, 1, 1]), height))
        rows = self._range(size, [-1, 1])
        if self.ratio > 0:
            count: Any = float(self.ratio)
            sample = self._range(self.ratio, [-1])
            place = self._place(begin, height, sample, count)
            inside = self._inside(place, size)
        else:
            asked = emit(aten.ceil.default, height)
            one = emit.number(1.0, self.rois)
            count = emit(aten.where.self, emit(aten.gt.Scalar, asked, 1.0), asked, one)  # where it is NaN too
            sample = self._near(rows, begin, height, count)
            place = self._place(begin, height, sample, count)
            inside = emit(aten.logical_and.default, self._inside(place, size), emit(aten.lt.Tensor, sample, asked))
        last = size - 1 if isinstance(size, int) else emit(operator.sub, size, 1)
        distance = emit(aten.abs.default, emit(aten.sub.Tensor, emit(aten.clamp.default, place, 0, last), rows))
        weight = emit(aten.clamp.default, emit(aten.add.Tensor, emit(aten.neg.default, distance), 1.0), 0.0)
        nothing = emit.number(0.0, self.rois)
        total = emit(aten.sum.dim_IntList, emit(aten.where.self, inside, weight, nothing), [-1], True)
        mean = emit(aten.div.Tensor, total, count)
        return emit(aten.squeeze.dims, mean, [-1])

    def _corner(self, column: int) -> Node:
        """A coordinate of every box in rows of the picture, (K, 1, 1, 1)."""
        emit = self.emit
        value = emit(aten.select.int, self.rois, 1, column)
        if self.scale != 1:
            value = emit(aten.mul.Tensor, value, self.scale)
        if self.aligned:
            value = emit(aten.sub.Tensor, value, 0.5)
        return emit(aten.reshape.default, value, [-1, 1, 1, 1])

    def _range(self, end: Any, shape: list[int]) -> Node:
        numbers = self.emit(aten.arange.start_step, 0, end, 1, dtype=self.dtype, device=self.device, pin_memory=False)
        return numbers if len(shape) == 1 else self.emit(aten.reshape.default, numbers, shape)

    def _place(self, begin: Node, height: Node, sample: Node, count: Any) -> Node:
        emit = self.emit
        middle = emit(aten.mul.Tensor, emit(aten.add.Tensor, sample, 0.5), height)
        return emit(aten.add.Tensor, begin, emit(aten.div.Tensor, middle, count))

    def _near(self, rows: Node, begin: Node, height: Node, count: Node) -> Node:
        """Numbers of the samples that may reach a row, less than 1 away from it; steps between samples are above 1/2.

        They begin a quarter of a step early, for places are rounded.
        """
        emit = self.emit
        above = emit(aten.sub.Tensor, emit(aten.sub.Tensor, rows, 1.0), begin)
        first = emit(aten.div.Tensor, above, emit(aten.div.Tensor, height, count))
        first = emit(aten.floor.default, emit(aten.sub.Tensor, first, 0.75))
        first = emit(aten.minimum.default, first, emit(aten.sub.Tensor, count, 1.0))
        return emit(aten.add.Tensor, emit(aten.clamp.default, first, 0.0), self._range(_NEAR, [-1]))

    def _inside(self, place: Node, size: Any) -> Node:
        emit = self.emit
        return emit(aten.logical_and.default, emit(aten.ge.Scalar, place, -1.0), emit(aten.le.Scalar, place, size))
