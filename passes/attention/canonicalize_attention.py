"""Hand-written attention, however written, to one plain ``aten.scaled_dot_product_attention``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sam3x.capture.program import erase_dead
from sam3x.errors import SpecError, Step
from sam3x.passes.attention.pattern import ASSERTIONS, PRODUCTS, match
from sam3x.passes.attention.rewrite import attend, explicit_causal, release_shapes, repeat_heads, rewrite
from sam3x.passes.base import MatchFailure, NoMatchError, Pass, PassResult, graph_modules, path_of
from sam3x.passes.graph.aten_nodes import SDPA, SOFTMAXES, argument, aten, dtype_of, same_shape, same_size, shape_of
from sam3x.passes.graph.emitter import Emitter
from sam3x.passes.graph.known_numbers import KnownNumbers

MaskKind = Literal["bool_keep", "bool_hide", "float"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOp:
    """What a custom operator's arguments mean; ``layout`` is of q, k, v and the result, one letter a dimension."""

    query: int | str
    key: int | str
    value: int | str
    mask: int | str | None
    mask_kind: MaskKind
    scale: float | int | str | None
    layout: str


_REGISTERED: dict[str, AttentionOp] = {}


def register_attention_op(
    name: str,
    *,
    query: int | str = 0,
    key: int | str = 1,
    value: int | str = 2,
    mask: int | str | None = None,
    mask_kind: MaskKind = "bool_keep",
    scale: float | int | str | None = None,
    layout: str = "BHND",
) -> None:
    """Say that the operator ``name`` ("mylib::attention") computes attention, so that it becomes SDPA.

    Args:
        name: of the operator, with its namespace.
        query: position or name of the argument. So are ``key``, ``value`` and ``mask``.
        key: see ``query``.
        value: see ``query``.
        mask: see ``query``; it broadcasts to (B, H, N, S), without the B or H that the layout lacks.
        mask_kind: "bool_keep" (True = may attend), "bool_hide" (True = may not) or "float" (added to the scores).
        scale: a float is the scale itself; an int or a str is the position or name of the argument that gives it; None is
            1/sqrt(D).
        layout: the order of the dimensions batch, heads, sequence, channels in q, k, v and the result: a permutation of
            "BHND", or without B, H or both. Fewer heads in k and v than in q are repeated.

    Raises:
        SpecError: no such operator is loaded, or an argument does not fit it.
    """
    refused = partial(SpecError, subject=f"register_attention_op('{name}')", step=Step.PASSES)
    namespace, _, operator_name = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace, None), operator_name, None) if namespace and operator_name else None
    if packet is None or not hasattr(packet, "overloads"):
        raise refused("no such operator is loaded", remedy="Import the library that defines 'namespace::name' first.")
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    arguments = {"query": query, "key": key, "value": value, "mask": mask}
    if isinstance(scale, (int, str)):
        arguments["scale"] = scale
    for role, where in arguments.items():
        if where is None and role == "mask":
            continue
        wrong = not isinstance(where, (int, str)) or isinstance(where, bool)
        if wrong or all(_position(schema, where) is None for schema in schemas):
            raise refused(f"{role}={where!r} is no argument of {schemas[0]}", remedy="Give its position or its name.")
    places = [_position(schemas[0], where) for role, where in arguments.items() if role != "scale" and where is not None]
    if len(set(places)) != len(places):
        raise refused("two of query, key, value and mask are the same argument", remedy="Give each its own.")
    if isinstance(scale, float) and not math.isfinite(scale):
        raise refused(f"scale={scale} is not finite", remedy="Give a number, an argument, or None for 1/sqrt(D).")
    if mask_kind not in get_args(MaskKind):
        raise refused(f"mask_kind={mask_kind!r} is unknown", remedy=f"Choose from {', '.join(get_args(MaskKind))}.")
    if len(set(layout)) != len(layout) or not {"N", "D"} <= set(layout) <= set("BHND"):
        raise refused(f"layout={layout!r} is no order of dimensions", remedy="Use 'BHND', 'BNHD', 'NBD', …")
    spec = AttentionOp(query=query, key=key, value=value, mask=mask, mask_kind=mask_kind, scale=scale, layout=layout)
    if _REGISTERED.get(name, spec) != spec:
        raise refused("it is registered otherwise already", remedy=f"Call unregister_attention_op('{name}') first.")
    _REGISTERED[name] = spec


def unregister_attention_op(name: str) -> None:
    """Forget a custom operator.

    Raises:
        SpecError: it is not registered.
    """
    if _REGISTERED.pop(name, None) is None:
        known = ", ".join(_REGISTERED) or "none"
        raise SpecError(
            "it is not registered",
            subject=f"unregister_attention_op('{name}')",
            remedy=f"Registered: {known}.",
            step=Step.PASSES,
        )


def _position(schema: Any, where: int | str) -> int | None:
    names = [argument.name for argument in schema.arguments]
    if isinstance(where, str):
        return names.index(where) if where in names else None
    return where if 0 <= where < len(names) else None


class CanonicalizeAttentionPass(Pass):
    """Softmax attention, flagged SDPA and registered operators → SDPA(q, k, v, mask, 0.0, False, scale=…).

    Never ``is_causal`` or ``enable_gqa``: the mask and the repeated heads are explicit. A row whose keys are all hidden with
    -inf gives zeros, torch's answer, where a plain softmax gives NaN; with a finite value it stays the average of the values.
    """

    name = "canonicalize_attention"
    run_after = ("eliminate_noops",)

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites, tidied = 0, False
        failures: list[MatchFailure] = []
        constants = KnownNumbers(program)
        for prefix, module in graph_modules(program):
            tidied |= erase_dead(module)  # an unused copy of the weights must not hide attention
            changed = False
            for node in list(module.graph.nodes):
                if node.op != "call_function":
                    continue
                old = node
                try:
                    if node.target in SOFTMAXES:
                        found = match(node, constants)
                        old = found.output[0]
                        new = rewrite(Emitter(module, old, found.dead), found, constants)
                        release_shapes(module, found.dead)
                        for dead in found.dead:
                            _drop_assertions(dead)
                    elif node.target is SDPA:
                        new = _plain(module, node)
                        if new is node:
                            continue
                    elif isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _REGISTERED:
                        old, new = _registered(module, node, constants)
                    else:
                        continue
                except NoMatchError as reason:
                    if node.target not in SOFTMAXES or _near_attention(node):
                        failures.append(MatchFailure(node=path_of(prefix, node), reason=str(reason)))
                    continue
                old.replace_all_uses_with(new)
                _drop_assertions(old)
                module.graph.erase_node(old)  # SDPA may draw random numbers, so dead code elimination keeps it
                rewrites, changed = rewrites + 1, True
            if changed:
                erase_dead(module)
        return PassResult(rewrites=rewrites, match_failures=tuple(failures), tidied=tidied)


def _drop_assertions(node: Node) -> None:
    for user in [user for user in node.users if user.target in ASSERTIONS]:
        node.graph.erase_node(user)


def _near_attention(softmax: Node) -> bool:
    """Whether a product makes the scores, or takes the probabilities: elementwise and reshaping steps lie between."""
    count = math.prod(shape_of(softmax))

    def scores_sized(node: Any) -> bool:
        value = node.meta.get("val") if isinstance(node, Node) else None
        return isinstance(value, torch.Tensor) and same_size(value.numel(), count)

    for neighbours, down in ((lambda n: n.all_input_nodes, False), (lambda n: list(n.users), True)):
        todo, seen = [softmax], {softmax}
        while todo:
            for node in neighbours(todo.pop()):
                if node.target in PRODUCTS | {aten.baddbmm.default} and (down or scores_sized(node)):
                    return True
                if node not in seen and scores_sized(node) and node.op == "call_function":
                    seen.add(node)
                    todo.append(node)
    return False


def _plain(module: GraphModule, node: Node) -> Node:
    """An SDPA node without flags; ``node`` itself when it has none."""
    causal, grouped = argument(node, 5, "is_causal", False), node.kwargs.get("enable_gqa", False)
    if not causal and not grouped:
        return node
    if argument(node, 4, "dropout_p", 0.0):
        raise NoMatchError("the attention drops weights at random")
    emit = Emitter(module, node)
    query: Any
    key: Any
    value: Any
    query, key, value = node.args[:3]
    mask = argument(node, 3, "attn_mask")
    try:
        if grouped:
            heads = shape_of(query)[-3]
            if not all(isinstance(shape_of(n)[-3], int) and isinstance(heads, int) for n in (key, value)):
                raise NoMatchError("the numbers of heads are not constants")
            key, value = repeat_heads(emit, key, heads), repeat_heads(emit, value, heads)
        if causal:
            mask = explicit_causal(emit, shape_of(query)[-2], shape_of(key)[-2], query.meta["val"].device)
    except NoMatchError:
        emit.undo()
        raise
    scale: Any = node.kwargs.get("scale")
    return attend(emit, query, key, value, mask, 1.0 / math.sqrt(shape_of(query)[-1]) if scale is None else scale)


def _registered(module: GraphModule, node: Node, constants: KnownNumbers) -> tuple[Node, Node]:
    """(the node to replace, its SDPA) of a registered operator."""
    schema = node.target._schema
    spec = _REGISTERED[schema.name]
    names = [argument.name for argument in schema.arguments]
    bound = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    bound.update({**dict(zip(names, node.args, strict=False)), **node.kwargs})

    def operand(where: int | str | None) -> Any:
        at = None if where is None else _position(schema, where)
        return None if at is None else bound.get(names[at])

    old = node
    if not isinstance(node.meta["val"], torch.Tensor):
        taken = {user.args[1]: user for user in node.users}
        if list(taken) != [0] or len(node.users) != 1:
            raise NoMatchError("more than the first result of the operator is used")
        old = taken[0]
    tensors = [operand(where) for where in (spec.query, spec.key, spec.value)]
    if not all(isinstance(tensor, Node) and len(shape_of(tensor)) == len(spec.layout) for tensor in tensors):
        raise NoMatchError(f"query, key and value are not of the registered layout {spec.layout}")
    if len({dtype_of(tensor) for tensor in tensors}) > 1:
        raise NoMatchError("query, key and value have different types")
    scale: Any = spec.scale if isinstance(spec.scale, float) else operand(spec.scale)
    if scale is not None and (scale := constants(scale)) is None:
        raise NoMatchError("the scale of the operator is not a constant")
    emit = Emitter(module, old)
    order = [spec.layout.index(letter) for letter in "BHND" if letter in spec.layout]
    try:
        q, k, v = (emit.permute(tensor, order) for tensor in tensors)
        for _ in range(4 - len(order)):
            q, k, v = (emit(aten.unsqueeze.default, tensor, 0) for tensor in (q, k, v))
        if "H" in spec.layout:
            heads = shape_of(q)[-3]
            for tensor in (k, v):
                groups = shape_of(tensor)[-3]
                whole = isinstance(heads, int) and isinstance(groups, int) and heads % groups == 0
                if not whole and not same_size(groups, heads):
                    raise NoMatchError("the query's heads are no multiple of the key's")
            k, v = repeat_heads(emit, k, heads), repeat_heads(emit, v, heads)
        mask = _registered_mask(emit, spec, operand(spec.mask), [*shape_of(q)[:-1], shape_of(k)[-2]], dtype_of(q))
        new = attend(emit, q, k, v, mask, 1.0 / math.sqrt(shape_of(q)[-1]) if scale is None else scale)
        for _ in range(4 - len(order)):
            new = emit(aten.squeeze.dims, new, [0])
        new = emit.permute(new, [order.index(dim) for dim in range(len(order))])
        if not same_shape(shape_of(new), shape_of(old)) or dtype_of(new) is not dtype_of(old):
            raise NoMatchError(f"the result is not of the registered layout {spec.layout}")
        # the operator promised this memory layout, and views may count on it
        return old, emit(aten.clone.default, new, memory_format=torch.contiguous_format)
    except NoMatchError:
        emit.undo()
        raise


def _registered_mask(emit: Emitter, spec: AttentionOp, mask: Any, scores: list[Any], dtype: torch.dtype) -> Node | None:
    if not isinstance(mask, Node):
        return None
    sizes = shape_of(mask)
    # sizes that the operator itself relates are unrelated symbols here: only a plain contradiction is refused
    pairs = zip(sizes[::-1], scores[::-1], strict=False)
    if len(sizes) > len(scores) or any(isinstance(a, int) and isinstance(b, int) and a not in (1, b) for a, b in pairs):
        raise NoMatchError(f"the mask {sizes} does not broadcast to {scores}")
    if (spec.mask_kind == "float") != dtype_of(mask).is_floating_point:
        raise NoMatchError(f"the mask is {dtype_of(mask)}, registered as {spec.mask_kind}")
    if spec.mask_kind == "float":
        return emit.cast(mask, dtype)
    return emit(aten.logical_not.default, mask) if spec.mask_kind == "bool_hide" else mask
