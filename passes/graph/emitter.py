"""Adds nodes to a graph, each with its value, its sizes named by what is there."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._prims_common import is_contiguous_or_false
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sam3x.passes.graph.aten_nodes import NOOPS, VIEWS, aten, dtype_of, permutation, same_shape, same_size, shape_of
from sam3x.passes.graph.form import NotAttentionError


class Emitter:
    """Adds nodes before one node, each with its ``meta["val"]``, without adding guards on symbols."""

    def __init__(self, module: GraphModule, before: Node, dying: Sequence[Node] = ()) -> None:
        self.graph, self.before, self._dying = module.graph, before, set(dying)
        self.new: list[Node] = []
        fake = torch._guards.detect_fake_mode([node.meta.get("val") for node in before.all_input_nodes])
        self._fake_mode: Any = fake if fake is not None else contextlib.nullcontext()

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        env = getattr(self._fake_mode, "shape_env", None)
        with self._fake_mode, env.suppress_guards() if env is not None else contextlib.nullcontext():
            yield

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add ``target(*args, **kwargs)``."""
        values = torch.fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
        with self._quietly():
            return self._add(target, args, kwargs, target(*values[0], **values[1]))

    def shaped(self, like: Node, shape: Sequence[Any], target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add ``target(*args, **kwargs)``, whose result is known to have ``shape`` and the dtype of ``like``."""
        with self._quietly():
            return self._add(target, args, kwargs, like.meta["val"].new_empty(shape))

    def _add(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        self.new.append(node)
        return node

    def undo(self) -> None:
        """Remove every node added so far."""
        for node in reversed(self.new):
            self.graph.erase_node(node)
        self.new.clear()

    def size(self, value: Any) -> Any:
        """``value`` as an int or as a node that gives it.

        Raises:
            NotAttentionError: nothing in the graph before the new nodes has that size.
        """
        if not isinstance(value, torch.SymInt):
            return value
        for node in self.graph.nodes:
            if node is self.before:
                break
            found = node.meta.get("val")
            # a size taken from the scores would keep them alive
            stays = not self._dying.intersection(node.all_input_nodes)
            if stays and isinstance(found, torch.SymInt) and statically_known_true(found == value):
                return node
        for node in itertools.takewhile(lambda node: node is not self.before, list(self.graph.nodes)):
            if isinstance(node.meta.get("val"), torch.Tensor) and node not in self._dying and node.target not in NOOPS:
                for dim, size in enumerate(shape_of(node)):
                    if same_size(size, value):
                        return self(aten.sym_size.int, node, dim)
        raise NotAttentionError(f"no tensor has the size {value} that the rewrite needs")

    def sizes(self, values: Sequence[Any]) -> list[Any]:
        """Every size as an int or a node."""
        return [self.size(value) for value in values]

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """``node`` in ``dtype``."""
        if dtype_of(node) is dtype:
            return node
        return self(aten._to_copy.default, node, dtype=dtype)

    def permute(self, node: Node, order: list[int]) -> Node:
        """``node`` with its dimensions in ``order``, on top of a permute that is already there."""
        inner = permutation(node)
        if inner is not None:
            node, order = node.args[0], [inner[dim] for dim in order]  # type: ignore[assignment]
        return node if order == sorted(order) else self(aten.permute.default, node, order)

    def reshape(self, node: Node, shape: Sequence[Any]) -> Node:
        """``node`` with ``shape``: an earlier tensor of that shape under views and clones, or a view."""
        source: Any = node
        while True:
            if same_shape(shape_of(source), shape):
                return source
            if source.target not in VIEWS | NOOPS:
                break
            source = source.args[0]
        if same_shape([1, *shape_of(node)], shape):
            return self(aten.unsqueeze.default, node, 0)
        if same_shape(shape_of(node), [1, *shape]):
            return self(aten.squeeze.dims, node, [0])
        sizes = self.sizes(shape)
        with self._quietly():
            contiguous = is_contiguous_or_false(node.meta["val"])  # sizes that a flag counts answer no question
        if not contiguous:
            node = self(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self.shaped(node, shape, aten.view.default, node, sizes)
