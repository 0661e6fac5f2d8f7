"""Emit canonical attention: one plain ``aten.scaled_dot_product_attention`` on (L, N, D), (L, S, D), (L, S, E)."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._prims_common import is_contiguous_or_false
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, statically_known_true

from sam3x.passes.attention_pattern import (
    CASTS,
    NOOPS,
    PERMUTES,
    RESHAPES,
    Attention,
    Axis,
    Constant,
    Layout,
    MaskStep,
    NotAttentionError,
    aten,
    dtype_of,
    leaves,
    number_factor,
    permutation,
    same_shape,
    same_size,
    shape_of,
)

SDPA = aten.scaled_dot_product_attention.default
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_HALF = (torch.float16, torch.bfloat16)
_FOLDABLE = {
    getattr(getattr(aten, name), overload)
    for name, overload in (
        *(("full", "default"), ("full_like", "default"), ("scalar_tensor", "default"), ("lift_fresh_copy", "default")),
        *(("sqrt", "default"), ("rsqrt", "default"), ("reciprocal", "default"), ("neg", "default"), ("exp", "default")),
        *(("mul", "Tensor"), ("div", "Tensor"), ("pow", "Tensor_Scalar"), ("_to_copy", "default"), ("clone", "default")),
        *(("alias", "default"), ("detach", "default"), ("view", "default"), ("expand", "default")),
    )
}


class Constants:
    """Numbers known at export time: constants, buffers (parameters are not), arithmetic on them, operands of ``cond``."""

    def __init__(self, program: ExportedProgram) -> None:
        self._known: dict[Node, torch.Tensor | None] = {}
        signature = program.graph_signature
        changing = set(signature.buffers_to_mutate.values())
        buffers = {name: target for name, target in signature.inputs_to_buffers.items() if target not in changing}
        fixed = {**buffers, **signature.inputs_to_lifted_tensor_constants}
        values = {**program.state_dict, **program.constants}
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in fixed:
                tensor = values.get(fixed[node.name])
                known = isinstance(tensor, torch.Tensor) and tensor.numel() == 1 and tensor.device.type != "meta"
                self._known[node] = tensor.detach().cpu().reshape(()) if known else None  # type: ignore[union-attr]
        self._bind(program.graph_module)

    def _bind(self, module: GraphModule) -> None:
        for node in module.graph.nodes:
            if node.target is not torch.ops.higher_order.cond:
                continue
            for branch in node.args[1:3]:
                child = getattr(module, branch.target)
                inner = [item for item in child.graph.nodes if item.op == "placeholder"]
                for placeholder, operand in zip(inner, node.args[3], strict=True):
                    value = self._tensor(operand)
                    # a graph that two conds share is a constant only where both agree
                    if placeholder in self._known and not _equal(self._known[placeholder], value):
                        value = None
                    self._known[placeholder] = value
                self._bind(child)

    def __call__(self, operand: Any) -> float | None:
        """The number ``operand`` stands for (every element of a constant tensor), or None."""
        if isinstance(operand, (bool, torch.SymInt, torch.SymFloat)) or operand is None:
            return None
        value = self._tensor(operand)
        return None if value is None else float(value)

    def _tensor(self, operand: Any) -> torch.Tensor | None:
        if isinstance(operand, (int, float)):
            return torch.tensor(operand, dtype=torch.float64)
        if not isinstance(operand, Node):
            return None
        if operand not in self._known:
            self._known[operand] = self._fold(operand)
        return self._known[operand]

    def _fold(self, node: Node) -> torch.Tensor | None:
        if node.op != "call_function" or node.target not in _FOLDABLE:
            return None
        if node.target in (aten.full.default, aten.full_like.default, aten.scalar_tensor.default):
            value = node.args[0] if node.target is aten.scalar_tensor.default else node.args[1]
            return None if isinstance(value, Node) else torch.tensor(value, dtype=dtype_of(node))
        first = self._tensor(node.args[0])
        if first is None:
            return None
        if node.target in RESHAPES | NOOPS | CASTS | {aten.lift_fresh_copy.default}:
            return first.reshape(()).to(dtype_of(node))
        rest = [self._tensor(argument) for argument in node.args[1:]]
        if node.kwargs or any(value is None for value in rest):
            return None
        if node.target is aten.pow.Tensor_Scalar:
            return torch.pow(first, float(rest[0])).to(dtype_of(node))  # type: ignore[arg-type]
        return node.target(first, *rest).reshape(()).to(dtype_of(node))  # type: ignore[operator]


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and bool(a == b)


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
        """``value`` as an int or as a node that gives it."""
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
            if source.target not in _VIEWS | NOOPS:
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

    def arrange(self, node: Node, layout: Layout, wanted: Layout, *, full: bool) -> Node:
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
        node = self.permute(node, order)
        layout = tuple(layout[dim] for dim in order)
        groups = [math.prod(axis.size for axis in group) for group in wanted]
        if layout == wanted[len(wanted) - len(layout) :]:
            if not full or same_shape(shape_of(node), groups):
                return node
            same = [-1 if same_size(a, b) else b for a, b in zip(shape_of(node), groups[-len(layout) :], strict=True)]
            return self(aten.expand.default, node, self.sizes([*groups[: len(groups) - len(layout)], *same]))
        have = [axis for size, dim in zip(shape_of(node), layout, strict=True) if not same_size(size, 1) for axis in dim]
        target = [axis for axis in place if axis in have]
        grown = [axis for group in wanted if full or set(group) & set(have) for axis in group]
        if have != target or grown != target:
            node = self.reshape(node, [axis.size for axis in have])
            node = self.permute(node, [have.index(axis) for axis in target])
        if grown != target:
            node = self.reshape(node, [axis.size if axis in have else 1 for axis in grown])
            node = self(aten.expand.default, node, self.sizes([axis.size for axis in grown]))
        return self.reshape(node, [size if set(group) & set(grown) else 1 for size, group in zip(groups, wanted, strict=True)])

    def unscaled(self, node: Node, constant: Constant) -> tuple[Node, float]:
        """(x, c) with node = c·x: constant factors found under reshapes, permutes and casts are taken out."""
        factor, kept = 1.0, 0
        moves: list[Node] = []
        below: Any = node
        source: Any = node
        while below.op == "call_function":
            scaled = number_factor(below, constant)
            if scaled is not None and math.isfinite(scaled[1]):
                below, factor = scaled[0], factor * scaled[1]
                source, kept = below, len(moves)
            elif below.target in RESHAPES | PERMUTES | NOOPS or (below.target in CASTS and dtype_of(below).is_floating_point):
                moves.append(below)
                below = below.args[0]
            else:
                break
        for move in reversed(moves[:kept]):
            source = self(move.target, source, *move.args[1:], **move.kwargs)
        return source, factor

    def mask(
        self, masks: Sequence[tuple[MaskStep, Layout]], wanted: Layout, dtype: torch.dtype
    ) -> tuple[Node | None, Node | None]:
        """(mask of all steps, rows): bool (True = may attend) when each hides with -inf, otherwise float.

        ``rows``, (…, N, 1) bool or None: where False, finite values fill the whole row and its scores must become zeros.
        """
        if not masks:
            return None, None
        steps = [step for step, _ in masks]
        tensors = [self.arrange(step.tensor, layout, wanted, full=False) for step, layout in masks]
        finite = [at for at, step in enumerate(steps) if step.fill is not None and math.isfinite(step.fill)]
        if all(step.fill == -math.inf for step in steps):
            return self._allowed(steps, tensors), None
        # one value that nothing is added to: the lowest number swallows the scores, so a filled row stays uniform
        after = steps[finite[0] :] if finite else steps
        swallow = dtype not in _HALF and len({steps[at].fill for at in finite}) == 1 and all(s.fill is not None for s in after)
        rows = None
        if finite and not swallow:
            filling = [(step, tensor) for step, tensor in zip(steps, tensors, strict=True) if step.fill is not None]
            allowed = self._allowed([step for step, _ in filling], [tensor for _, tensor in filling])
            rows = self(aten.any.dim, allowed, -1, True)
            if len(finite) == len(steps) and len({step.fill for step in steps}) == 1:
                return self(aten.logical_or.default, allowed, self(aten.logical_not.default, rows)), rows
        lowest = torch.finfo(dtype).min
        result: Node | None = None
        for step, tensor in zip(steps, tensors, strict=True):
            if step.fill is None:
                tensor = self._narrow(tensor, dtype)
                tensor = tensor if step.factor == 1.0 else self(aten.mul.Tensor, tensor, step.factor)
                result = tensor if result is None else self(aten.add.Tensor, result, tensor)
                continue
            fill = step.fill if math.isinf(step.fill) else lowest if swallow else max(step.fill, lowest)
            filled = self._scalar(fill, dtype, tensor)
            other = result if result is not None else self._scalar(0.0, dtype, tensor)
            result = self(aten.where.self, tensor, *((other, filled) if step.inverted else (filled, other)))
        return result, rows

    def _allowed(self, steps: Sequence[MaskStep], tensors: Sequence[Node]) -> Node:
        result: Node | None = None
        for step, tensor in zip(steps, tensors, strict=True):
            if step.inverted:
                keep = tensor
            elif tensor.target is aten.logical_not.default and dtype_of(tensor.args[0]) is torch.bool:  # type: ignore[arg-type]
                keep = tensor.args[0]  # type: ignore[assignment]
            else:
                keep = self(aten.logical_not.default, tensor)
            result = keep if result is None else self(aten.logical_and.default, result, keep)
        assert result is not None
        return result

    def _scalar(self, value: float, dtype: torch.dtype, like: Node) -> Node:
        return self(aten.full.default, [], value, dtype=dtype, device=like.meta["val"].device)

    def _narrow(self, mask: Node, dtype: torch.dtype) -> Node:
        """A float mask in ``dtype``: below its range becomes its lowest number, so no finite mask turns into -inf."""
        have = dtype_of(mask)
        if have.is_floating_point and torch.finfo(have).min < torch.finfo(dtype).min:
            mask = self(aten.clamp.default, mask, torch.finfo(dtype).min)
        return self.cast(mask, dtype)


def rewrite(emit: Emitter, found: Attention, constant: Constant) -> Node:
    """Emit ``found`` as canonical attention and return the node that replaces its output.

    Raises:
        NotAttentionError: when a size cannot be named; nothing of it is left in the graph.
    """
    try:
        return _rewrite(emit, found, constant)
    except NotAttentionError:
        emit.undo()
        raise


def _rewrite(emit: Emitter, found: Attention, constant: Constant) -> Node:
    lead = _lead(found)
    q, on_q = emit.unscaled(found.query[0], constant)
    k, on_k = emit.unscaled(found.key[0], constant)
    scale = found.scale * on_q * on_k
    q = emit.arrange(q, found.query[1], (*lead, found.queries, found.channels), full=True)
    k = emit.arrange(k, found.key[1], (*lead, found.keys, found.channels), full=True)
    v = emit.arrange(found.value[0], found.value[1], (*lead, found.keys, found.value_channels), full=True)
    dtype = torch.promote_types(torch.promote_types(dtype_of(q), dtype_of(k)), dtype_of(v))
    fills = {step.fill for step, _ in found.masks} - {-math.inf}
    if dtype in _HALF and len(fills) > 1:
        dtype = torch.float32  # a finite fill plus a float mask, and the distance of two fills, may not fit a half type
    mask, rows = emit.mask(found.masks, (*lead, found.queries, found.keys), dtype)
    q, k, v = (emit.cast(node, dtype) for node in (q, k, v))
    if rows is not None:
        q = emit(aten.where.self, rows, q, emit(aten.full.default, [], 0.0, dtype=dtype, device=q.meta["val"].device))
    output, layout = found.output
    result = attend(emit, q, k, v, mask, scale)
    result = emit.cast(result, dtype_of(output))
    return _finish(emit, result, output, (*lead, found.queries, found.value_channels), layout)


def _lead(found: Attention) -> Layout:
    """Two groups of leading axes: batch and heads, as joined further up in the query where they come as one."""
    axes = tuple(itertools.chain(*found.lead))
    if len(found.lead) == 2:
        return found.lead
    if not axes:
        return ((), ())
    source: Any = found.query[0]
    while source.op == "call_function" and source.target in _VIEWS | NOOPS:
        source = source.args[0]
        batch, heads = shape_of(source)[:2] if len(shape_of(source)) == 4 else (1, 1)
        if not same_size(batch, 1) and not same_size(heads, 1) and same_size(batch * heads, axes[0].size):
            axes[0].parts = (Axis(batch), Axis(heads))
            return tuple((part,) for part in axes[0].parts)
    return ((), axes)


def attend(emit: Emitter, q: Node, k: Node, v: Node, mask: Node | None, scale: float) -> Node:
    """The one plain node; kernels take the maximum before the scale, so only a positive scale goes there."""
    if not scale > 0:
        q, scale = emit(aten.mul.Tensor, q, scale), 1.0
    operands = (q, k, v, mask, 0.0, False)
    try:
        return emit(SDPA, *operands, scale=float(scale))
    except GuardOnDataDependentSymNode:  # torch asks whether a size that only a run tells is 1, to broadcast the mask
        shape = (*q.meta["val"].shape[:-1], v.meta["val"].shape[-1])
        return emit.shaped(q, shape, SDPA, *operands, scale=float(scale))


def _finish(emit: Emitter, result: Node, output: Node, have: Layout, wanted: Layout) -> Node:
    """``result`` in the layout of the product it replaces, laid out in memory as that was where a view follows."""
    if _viewed(output):
        result = emit(aten.clone.default, result, memory_format=torch.contiguous_format)
    final = emit.arrange(result, have, wanted, full=True)
    if not same_shape(shape_of(final), shape_of(output)):
        final = emit.reshape(final, shape_of(output))
    if final is not result and final.target is aten.view.default:
        for user in [user for user in output.users if user.target in _VIEWS]:
            returned = any(item.op == "output" for item in user.users)  # its name stands in the signature
            if not returned and same_shape(shape_of(user), shape_of(result)) and final.args[0] is result:
                user.replace_all_uses_with(result)
    return final


def release_shapes(module: GraphModule, dying: Sequence[Node]) -> None:
    """Give what only reads the sizes of ``dying`` nodes another source, so that they can go."""
    for node in dying:
        for user in list(node.users):
            emit = Emitter(module, user, dying)
            with contextlib.suppress(NotAttentionError):
                if user.target is aten.sym_size.int:
                    user.replace_all_uses_with(emit.size(user.meta["val"]))
                elif user.target is aten.full_like.default and not set(user.users) <= set(dying):
                    like = user.meta["val"]
                    sizes = emit.sizes(shape_of(user))
                    new = emit(aten.full.default, sizes, user.args[1], dtype=like.dtype, device=like.device)
                    user.replace_all_uses_with(new)


def _viewed(node: Node) -> bool:
    """Whether a view depends on the memory layout of ``node``, directly or through permutes."""
    return any(
        user.target in _VIEWS or (user.target in PERMUTES | {aten.alias.default, aten.detach.default} and _viewed(user))
        for user in node.users
    )


def explicit_causal(emit: Emitter, queries: Any, keys: Any, device: torch.device) -> Node:
    """(N, S) bool, True where key ≤ query: what ``is_causal`` means to torch, for any N and S."""
    rows = emit(aten.arange.default, emit.size(queries), device=device, pin_memory=False)
    columns = emit(aten.arange.default, emit.size(keys), device=device, pin_memory=False)
    return emit(aten.le.Tensor, columns, emit(aten.unsqueeze.default, rows, -1))


def repeat_heads(emit: Emitter, node: Node, heads: int) -> Node:
    """(…, G, S, D) to (…, heads, S, D): each head repeated heads/G times in a row."""
    *outer, groups, length, width = shape_of(node)
    if same_size(groups, heads):
        return node
    node = emit(aten.unsqueeze.default, node, -3)
    node = emit(aten.expand.default, node, emit.sizes([*outer, groups, heads // operator.index(groups), length, width]))
    node = emit(aten.clone.default, node, memory_format=torch.contiguous_format)
    return emit(aten.view.default, node, emit.sizes([*outer, heads, length, width]))
