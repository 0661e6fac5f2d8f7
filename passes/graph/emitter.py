"""Adds nodes to a graph, each with its value, its sizes named by what is there."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._prims_common import is_contiguous_or_false
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sam3x.passes.base import NoMatchError
from sam3x.passes.graph.aten_nodes import NOOPS, VIEWS, aten, dtype_of, permutation, same_shape, same_size, shape_of


def fake_mode_of(module: GraphModule) -> Any:
    """The fake mode of the graph's values; None where none is fake."""
    values = (node.meta.get("val") for node in module.graph.nodes)
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


@contextlib.contextmanager
def quietly(fake_mode: Any) -> Iterator[None]:
    """Compute on fake tensors without adding guards or pending symbols.

    With torch's Python kernels, as in a trace: some in C++, ``constant_pad_nd``, make numbers of symbols.
    """
    env = getattr(fake_mode, "shape_env", None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(enable_python_dispatcher())
        if fake_mode is not None:
            stack.enter_context(fake_mode)
        if env is not None:
            stack.enter_context(env.suppress_guards())
            stack.enter_context(env.ignore_fresh_unbacked_symbols())
        yield


def size_of(fake_mode: Any, value: sympy.Expr) -> Any:
    """An expression as a size."""
    return int(value) if value.is_Integer else fake_mode.shape_env.create_symintnode(value, hint=None)


def reserve_names(graph: Graph) -> None:
    """Let the graph know the names its nodes were given from outside, or a new node may get one of them again."""
    graph._graph_namespace._used_names.update(node.name for node in graph.nodes)


def following(node: Node) -> Node:
    """The first node behind ``node`` in front of which others may stand."""
    node = node.next
    while node.op == "placeholder":
        node = node.next
    return node


def put(node: Node, value: Any) -> None:
    """Put a node or a number in the place of ``node``."""
    if isinstance(value, Node):
        node.replace_all_uses_with(value)
    for user in list(node.users):
        args, kwargs = torch.fx.node.map_arg((user.args, user.kwargs), lambda item: value if item is node else item)
        user.args, user.kwargs = args, kwargs
    node.graph.erase_node(node)


class Emitter:
    """Adds nodes to a graph, each with its ``meta["val"]``, without adding guards on symbols.

    Args:
        before: where nodes are added; None: at the end.
        dying: nodes whose sizes no new node may read.
        val: what is known of an operand.
    """

    def __init__(
        self,
        module: GraphModule,
        before: Node | None,
        dying: Sequence[Node] = (),
        val: Callable[[Node], Any] = lambda node: node.meta["val"],
    ) -> None:
        self.graph, self.before, self._dying, self._val = module.graph, before, set(dying), val
        self.new: list[Node] = []
        self.fake_mode = fake_mode_of(module)
        reserve_names(module.graph)

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add ``target(*args, **kwargs)``."""
        values = torch.fx.node.map_arg((args, kwargs), self._val)
        with quietly(self.fake_mode):
            return self._add(target, args, kwargs, target(*values[0], **values[1]))

    def shaped(self, like: Node, shape: Sequence[Any], target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add ``target(*args, **kwargs)``, whose result is known to have ``shape`` and the dtype of ``like``."""
        with quietly(self.fake_mode):
            return self._add(target, args, kwargs, like.meta["val"].new_empty(shape))

    def _add(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Node:
        with contextlib.nullcontext() if self.before is None else self.graph.inserting_before(self.before):
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
            NoMatchError: nothing in the graph before the new nodes has that size.
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
        raise NoMatchError(f"no tensor has the size {value} that the rewrite needs")

    def sizes(self, values: Sequence[Any]) -> list[Any]:
        """Every size as an int or a node."""
        return [self.size(value) for value in values]

    def dim(self, node: Node, dim: int) -> Any:
        """A size of ``node`` as an int or as a node that reads it."""
        value = shape_of(node)[dim]
        return self(aten.sym_size.int, node, dim) if isinstance(value, torch.SymInt) else value

    def number(self, value: float, like: Node, dtype: torch.dtype | None = None) -> Node:
        """A tensor without dimensions on the device of ``like``, in its dtype where no other is given."""
        return self(aten.full.default, [], value, dtype=dtype or dtype_of(like), device=like.meta["val"].device)

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
        with quietly(self.fake_mode):
            contiguous = is_contiguous_or_false(node.meta["val"])  # sizes that a flag counts answer no question
        if not contiguous:
            node = self(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self.shaped(node, shape, aten.view.default, node, sizes)
