"""Emit a tensor's dimensions in another layout: permuted, regrouped, expanded."""

from __future__ import annotations

import itertools
import math

from torch.fx import Node

from sam3x.passes.graph.aten_nodes import aten, same_shape, same_size, shape_of
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.form import Layout, leaves


def arrange(emit: Emitter, node: Node, layout: Layout, wanted: Layout, *, full: bool) -> Node:
    """``node``, dimensions ``layout``, as dimensions ``wanted``; ``full`` expands those it broadcasts over."""
    sizes = shape_of(node)
    layout = tuple(leaves(dim) for dim in layout[len(layout) - len(sizes) :])
    wanted = tuple(leaves(dim) for dim in wanted)
    place = {axis: at for at, axis in enumerate(itertools.chain(*wanted))}
    # whole dimensions first: a permute on top of a permute often cancels, and most layouts need no more
    keys = [-1]
    for dim in layout:
        keys.append(2 * place[dim[0]] if dim else keys[-1] | 1)
    order = sorted(range(len(layout)), key=keys[1:].__getitem__)
    node = emit.permute(node, order)
    layout = tuple(layout[dim] for dim in order)
    groups = [math.prod(axis.size for axis in group) for group in wanted]
    if layout == wanted[len(wanted) - len(layout) :]:
        if not full or same_shape(shape_of(node), groups):
            return node
        same = [-1 if same_size(a, b) else b for a, b in zip(shape_of(node), groups[-len(layout) :], strict=True)]
        return emit(aten.expand.default, node, emit.sizes([*groups[: len(groups) - len(layout)], *same]))
    have = [axis for size, dim in zip(shape_of(node), layout, strict=True) if not same_size(size, 1) for axis in dim]
    target = [axis for axis in place if axis in have]
    grown = [axis for group in wanted if full or set(group) & set(have) for axis in group]
    if have != target or grown != target:
        node = emit.reshape(node, [axis.size for axis in have])
        node = emit.permute(node, [have.index(axis) for axis in target])
    if grown != target:
        node = emit.reshape(node, [axis.size if axis in have else 1 for axis in grown])
        node = emit(aten.expand.default, node, emit.sizes([axis.size for axis in grown]))
    return emit.reshape(node, [size if set(group) & set(grown) else 1 for size, group in zip(groups, wanted, strict=True)])
