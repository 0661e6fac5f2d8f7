"""From the operators that torch.export records to core ATen, node by node."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from sam3x.capture.program import erase_dead, sync_outputs

aten = torch.ops.aten
KEPT_WHOLE = (aten.linear.default, aten.layer_norm.default, aten.matmul.default, aten.scaled_dot_product_attention.default)
"""Operators the passes and targets want to see as one node."""
_RESIZED = (aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec)
"""Composite operators that torch's own table leaves as they are; taken apart they are gathers, which are slower."""

_COMPUTED = {*KEPT_WHOLE, *_RESIZED, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.batch_norm.default}
"""Composite operators whose results are new memory."""

_AUTOCAST, _GRAD_MODE = torch.ops.higher_order.wrap_with_autocast, torch.ops.higher_order.wrap_with_set_grad_enabled
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}

_SCATTERED = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}
"""A view of a part → what puts a new part into the whole."""

ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn")
"""Where a node came from, in its ``meta``."""

Table = Mapping[Any, Callable[..., Any]]


class _NeedsTraceError(Exception):
    """A node that cannot be rewritten by itself."""


@functools.cache
def core_decompositions() -> Table:
    """torch's default table, less ``KEPT_WHOLE``."""
    table = torch.export.default_decompositions()
    return {op: function for op, function in table.items() if op not in KEPT_WHOLE}


def decomposed(program: ExportedProgram, table: Table | None = None) -> ExportedProgram:
    """``program``, functional, less the operators of ``table``. It is consumed.

    ``ExportedProgram.run_decompositions`` gives the same and traces every branch twice, which takes most of a capture. Here
    only the nodes that change are traced; the whole program is where a node cannot change by itself (a write into a view).

    Args:
        table: operator → what stands in its place; by default all that is no core ATen, ``KEPT_WHOLE`` left as they are.
    """
    core = table is None
    table = core_decompositions() if table is None else table
    try:
        _inline_modes(program.graph_module)
        graphs = [module for module in program.graph_module.modules() if isinstance(module, GraphModule)]
        for module in graphs:
            _functionalize(module)
        first = next(node for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor))
        traced: dict[Hashable, torch.fx.Graph] = {}
        plans = [_expansions(module, table, first, core, traced) for module in graphs]
    except _NeedsTraceError:
        return ExportedProgram.run_decompositions(program, dict(table))
    for module, plan in zip(graphs, plans, strict=True):
        replaced: dict[Node, Node] = {}
        for node, item in plan.items():
            _replace(module, node, item, replaced)
        _share_sizes(module)
        erase_dead(module)
        module.recompile()
    sync_outputs(program)
    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph_module.graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
    )


def expansion(node: Node, function: Callable[..., Any], table: Table, inputs: Sequence[Node]) -> GraphModule:
    """What ``function`` computes of the arguments of ``node``.

    Args:
        inputs: become the placeholders: ``node.all_input_nodes``, and nodes before them whose sizes the result may read.
    """

    def body(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: given[n])
        return function(*args, **kwargs)

    traced = make_fx(body, tracing_mode="symbolic", decomposition_table=table)(*(n.meta["val"] for n in inputs))
    traced.graph.eliminate_dead_code()
    return traced


def _inline_modes(module: GraphModule) -> None:
    """Put the bodies of blocks under ``torch.no_grad`` or an autocast that is off, or not the CPU's, in their places.

    Raises:
        _NeedsTraceError: a block casts, or holds branches.
    """
    for child in list(module.children()):
        if isinstance(child, GraphModule):
            _inline_modes(child)
    for node in list(module.graph.nodes):
        arguments: Any = node.args
        if node.target is _AUTOCAST:
            device, _, enabled, _, body, *inputs = arguments
            if enabled and device == "cpu":
                raise _NeedsTraceError(node)
        elif node.target is _GRAD_MODE:
            _, body, *inputs = arguments
        else:
            continue
        block = getattr(module, body.target)
        if any(n.op == "get_attr" for n in block.graph.nodes):
            raise _NeedsTraceError(node)
        _replace(module, node, _Expansion(inputs=inputs, graph=block.graph), {})
        if not body.users:
            module.graph.erase_node(body)
            delattr(module, body.target)


def _functionalize(module: GraphModule) -> None:
    """``x.op_()`` → ``x = x.op()``, and written back where ``x`` is a part of a tensor; where nothing else sees that memory.

    Raises:
        _NeedsTraceError: something else may.
    """
    before: set[Node] = set()
    for node in module.graph.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            _functionalize_one(module, node, before)
        before.add(node)


def _functionalize_one(module: GraphModule, node: Any, before: set[Node]) -> None:
    written: Any = node.args[0]
    op: Any = _functional(node.target)
    parts: list[Any] = []  # the views that lead from the tensor to what is written, each read by the next alone
    while written.target in _SCATTERED and len(written.users) == 1:
        parts.append(written)
        written = written.args[0]
    readers = [user for user in written.users if user in before and user not in parts]
    if op is None or not _new_memory(written) or not all(_settled(user, before) for user in readers) or (parts and node.users):
        raise _NeedsTraceError(node)
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    value, old = op(*args, **kwargs), node.meta["val"]
    if value.dtype != old.dtype or tuple(value.shape) != tuple(old.shape):
        raise _NeedsTraceError(node)  # the functional form promotes or broadcasts
    node.target = op
    now = node
    for part in parts:
        with module.graph.inserting_after(now):
            now = module.graph.call_function(_SCATTERED[part.target], (part.args[0], now, *part.args[1:]), part.kwargs)
        whole = part.args[0].meta["val"]
        now.meta = {**{key: value for key, value in node.meta.items() if key in ORIGIN}, "val": torch.empty_like(whole)}
    made = {node, now, *parts}
    written.replace_all_uses_with(now, delete_user_cb=lambda user: user not in before and user not in made)


def _functional(op: OpOverload) -> OpOverload | None:
    """``aten.add_.Tensor`` → ``aten.add.Tensor``; None where an operator writes anything but its first argument."""
    first, *rest = op._schema.arguments
    name = op._schema.name.removeprefix("aten::")
    if not name.endswith("_") or first.alias_info is None or any(item.alias_info for item in rest):
        return None
    return getattr(getattr(aten, name[:-1], None), op._overloadname, None)


def _new_memory(node: Node) -> bool:
    """Whether a result surely shares no memory with the arguments; composite operators may return what they were given."""
    op = node.target
    if not isinstance(op, OpOverload) or (op._can_decompose() and op not in _COMPUTED):
        return False
    return not any(item.alias_info for item in op._schema.returns)


def _settled(reader: Node, before: set[Node]) -> bool:
    """Whether nothing outside ``before`` reads memory through ``reader``."""
    return _new_memory(reader) or all(user in before and _settled(user, before) for user in reader.users)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expansion:
    """``graph``'s placeholders are ``inputs``."""

    inputs: list[Node]
    graph: torch.fx.Graph


def _expansions(
    module: GraphModule, table: Table, first: Node, core: bool, known_graphs: dict[Hashable, torch.fx.Graph]
) -> dict[Node, _Expansion]:
    """Trace the decomposition of each node whose operator ``table`` has; of nodes that are alike, once.

    Args:
        first: a tensor whose fake mode new values take, where a node takes no tensor.
        core: also in the place of composite operators that it lacks, but for ``KEPT_WHOLE`` and ``_RESIZED``.
        known_graphs: what was traced so far, added to; layers repeat each other.

    Raises:
        _NeedsTraceError: a node needs a constant, or holds a product that torch would keep whole.
    """
    known: dict[str, Node] = {}
    found = {}
    for node in module.graph.nodes:
        value, op = node.meta.get("val"), node.target
        if isinstance(value, torch.SymInt):
            known.setdefault(str(value.node.expr), node)
        if isinstance(op, torch._ops.HigherOrderOperator) and op is not torch.ops.higher_order.cond:
            raise _NeedsTraceError(node)
        if not isinstance(op, OpOverload) or not isinstance(value, (torch.Tensor, tuple, list)):
            continue
        composite = core and op not in (*KEPT_WHOLE, *_RESIZED) and op._can_decompose()
        function = table.get(op, op.decompose if composite else None)
        if function is None:
            continue
        inputs = [first, *known.values(), *node.all_input_nodes]
        key = _call(node, inputs)
        if key not in known_graphs:
            graph = expansion(node, function, table, inputs).graph
            made = {n.target for n in graph.nodes if n.op == "call_function"}
            hides_product = composite and op is not aten.einsum.default and made & _PRODUCTS
            if hides_product or any(n.op == "get_attr" for n in graph.nodes):
                raise _NeedsTraceError(node)
            known_graphs[key] = graph
        found[node] = _Expansion(inputs=inputs, graph=known_graphs[key])
    return found


def _call(node: Node, inputs: Sequence[Node]) -> Hashable:
    """Return a key that nodes of equal expansions share: the operator, its constants, the types and places of ``inputs``."""
    places = {item: index for index, item in enumerate(inputs)}
    arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda item: f"%{places[item]}")
    return node.target, repr(arguments), tuple(_type(item.meta["val"]) for item in inputs)


def _type(value: Any) -> Hashable:
    """Return dtype, device, sizes and layout of a fake tensor, or the expression of a symbolic size, as a part of a key."""
    if isinstance(value, (list, tuple)):
        return tuple(_type(item) for item in value)
    if isinstance(value, torch.Tensor):
        layout = (*map(_type, value.stride()), _type(value.storage_offset()), value.is_conj(), value.is_neg())
        return value.dtype, value.device, value.requires_grad, tuple(map(_type, value.shape)), layout
    return value.node.expr if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value


def _share_sizes(module: GraphModule) -> None:
    """Read each size at one place, the first."""
    first: dict[str, Node] = {}
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt):
            continue
        earlier = first.setdefault(str(value.node.expr), node)
        if earlier is not node and node.target is aten.sym_size.int:
            node.replace_all_uses_with(earlier)


def _replace(module: GraphModule, node: Node, item: _Expansion, replaced: dict[Node, Node]) -> None:
    """Put ``item`` in the place of ``node``. ``replaced``: each node that is gone → what stands in its place."""
    inputs = [replaced.get(value, value) for value in item.inputs]
    mapped: dict[Node, Node] = dict(zip((n for n in item.graph.nodes if n.op == "placeholder"), inputs, strict=True))
    with module.graph.inserting_before(node):
        output: Any = module.graph.graph_copy(item.graph, mapped)
    for old, new in mapped.items():
        if old.op != "placeholder":
            new.meta = {**{name: value for name, value in node.meta.items() if name in ORIGIN}, **new.meta}
    single = isinstance(output, Node)
    for old in [node] if single else list(node.users):  # operator.getitem
        replaced[old] = output if single else output[old.args[1]]
        old.replace_all_uses_with(replaced[old])
        module.graph.erase_node(old)
    if not single:
        module.graph.erase_node(node)
