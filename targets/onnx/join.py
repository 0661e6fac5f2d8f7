"""Join ONNX graphs into one: what a part writes under a name, later parts read under it.

On onnx_ir's objects, where a use is a reference: a name inside a sub-graph cannot be missed, and weights are moved, not copied.
(``onnx.compose.merge_models`` copies the weights twice, asks for names that are unique already, and knows no sub-graph's own.)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sam3x.errors import LoweringError

if TYPE_CHECKING:
    import onnx_ir as ir

_SYMBOL = re.compile(r"\b[A-Za-z_]\w*\b(?!\()")  # not the names of functions, as in Max(1, s0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One graph of several.

    Attributes:
        name: what the names inside begin with. model: taken apart by ``join``.
        reads: graph input → tensor. An input that is not named reads the tensor of its own name.
        writes: graph output → tensor; likewise.
    """

    name: str
    model: ir.Model
    reads: Mapping[str, str] = field(default_factory=dict)
    writes: Mapping[str, str] = field(default_factory=dict)


def join(
    parts: Sequence[Part], *, inputs: Sequence[str], outputs: Sequence[str], name: str, sizes: Collection[str] = ()
) -> ir.Model:
    """One model of ``parts``, which stand in the order in which they run.

    Names inside get the part's in front (``decoder/add_3``). A symbolic size is replaced by what feeds it; one that only a part
    knows gets the part's name, since ONNX Runtime takes sizes of one name for equal. Equal weights are kept once.

    Args:
        inputs: tensors that no part writes, in the order of the graph's inputs. outputs: tensors that leave the graph.
        sizes: symbolic sizes that keep their names, whichever part they come from.

    Raises:
        LoweringError: opset versions, dtypes or sizes do not agree, or a tensor is missing.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    both = sorted(set(inputs) & set(outputs))
    if both:
        raise LoweringError(f"'{both[0]}' goes in and comes out", subject=f"join {name}", remedy="Write it under another name.")
    model = ir.Model(ir.Graph([], [], nodes=[], name=name), ir_version=max(part.model.ir_version for part in parts))
    model.producer_name = parts[0].model.producer_name
    tensors: dict[str, ir.Value] = {}
    for part in parts:
        common.InlinePass()(part.model)
        common.RemoveInitializersFromInputsPass()(part.model)
        _merge_head(model, part)
        _move(model.graph, part, tensors, set(inputs), {size: size for size in sizes})
    missing = [tensor for tensor in (*inputs, *outputs) if tensor not in tensors]
    if missing:
        raise LoweringError(f"no part knows '{missing[0]}'; there are {', '.join(sorted(tensors))}", subject=f"join {name}")
    model.graph.inputs.extend(tensors[tensor] for tensor in inputs)
    model.graph.outputs.extend(tensors[tensor] for tensor in outputs)
    ir.passes.Sequential(
        common.OutputFixPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(
            lift_all_constants=True, size_limit=0
        ),  # onnxslim makes a double of `value_float`
        common.DeduplicateHashedInitializersPass(),
    )(model)
    for value, tensor in zip((*model.graph.outputs, *model.graph.inputs), (*outputs, *inputs), strict=True):
        value.name = tensor
    common.NameFixPass()(model)
    return model


def _merge_head(model: ir.Model, part: Part) -> None:
    """Opset imports and metadata: the union. A key that is taken gets the part's name."""
    for domain, opset in part.model.opset_imports.items():
        if model.opset_imports.setdefault(domain, opset) != opset:
            raise LoweringError(
                f"its opset of '{domain or 'ai.onnx'}' is {opset}, the others' {model.opset_imports[domain]}",
                subject=f"join {part.name}",
                remedy="Export all parts with one version.",
            )
    for key, text in part.model.metadata_props.items():
        if model.metadata_props.setdefault(key, text) != text:
            model.metadata_props[f"{part.name}/{key}"] = text


def _move(graph: ir.Graph, part: Part, tensors: dict[str, ir.Value], outer: set[str], sizes: dict[str, str | int]) -> None:
    """Everything of ``part`` into ``graph``; its outputs into ``tensors``. ``sizes``: the part's symbols → the graph's."""
    import onnx_ir as ir

    own = part.model.graph
    inputs, results = list(own.inputs), list(own.outputs)
    own.inputs.clear()
    own.outputs.clear()
    initializers = [own.initializers.pop(key) for key in list(own.initializers)]
    fed: dict[ir.Value, ir.Value] = {}
    for value in inputs:
        tensor = part.reads.get(str(value.name), str(value.name))
        if tensor not in tensors:
            if tensor not in outer:
                raise LoweringError(
                    f"nothing before it gives '{tensor}'", subject=f"join {part.name}", remedy="Name it as an input."
                )
            tensors[tensor] = ir.Value(name=tensor, type=value.type, shape=value.shape)
        _connect(part, value, tensors[tensor], sizes)
        fed[value] = tensors[tensor]
    for value in (*_inner_values(own), *initializers):
        if value.name:
            value.name = f"{part.name}/{value.name}"
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(part, dim, sizes) for dim in value.shape])
    for node in ir.traversal.RecursiveGraphIterator(own):
        node.name = f"{part.name}/{node.name or node.op_type}"
    nodes = list(own)
    own.remove(nodes)
    graph.extend(nodes)
    for value in initializers:
        graph.initializers.add(value)
    for value, source in fed.items():
        value.replace_all_uses_with(source)
    for value in results:
        tensor = part.writes.get(_plain(part, value), _plain(part, value))
        if tensor in tensors:
            raise LoweringError(
                f"'{tensor}' is there already", subject=f"join {part.name}", remedy="Write it under another name."
            )
        tensors[tensor] = fed.get(value, value)


def _inner_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """What nodes give, and inputs and initializers of sub-graphs."""
    import onnx_ir as ir

    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs
    for inner in graph.subgraphs():
        yield from inner.inputs
        yield from (value for value in inner.initializers.values() if value not in set(inner.inputs))


def _plain(part: Part, value: ir.Value) -> str:
    """A result's name in its own file."""
    return str(value.name).removeprefix(f"{part.name}/")


def _connect(part: Part, value: ir.Value, source: ir.Value, sizes: dict[str, str | int]) -> None:
    """Check that ``source`` may feed ``value``, and note what the part's symbolic sizes are outside of it."""
    import onnx_ir as ir

    different = value.dtype is not None and source.dtype is not None and value.dtype != source.dtype
    if value.shape is not None and source.shape is not None:
        different |= len(value.shape) != len(source.shape)
        for mine, theirs in zip(value.shape, source.shape, strict=False):
            if isinstance(mine, int):
                different |= isinstance(theirs, int) and mine != theirs
                continue
            known = theirs.value if isinstance(theirs, ir.SymbolicDim) else theirs
            if known is not None and mine.value and _SYMBOL.fullmatch(mine.value):
                sizes.setdefault(mine.value, known)
    if different:
        raise LoweringError(
            f"'{value.name}' is {value.dtype} {value.shape}, and what would feed it {source.dtype} {source.shape}",
            subject=f"join {part.name}",
            remedy="Export both with the same options.",
        )


def _renamed(part: Part, dim: int | ir.SymbolicDim, sizes: Mapping[str, str | int]) -> int | str | None:
    """A size inside a part in the names of the joined graph."""
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    if dim.value in sizes:
        return sizes[dim.value]

    def outside(match: re.Match[str]) -> str:
        known = sizes.get(match[0], f"{part.name}_{match[0]}")
        return str(known) if isinstance(known, int) or _SYMBOL.fullmatch(known) else f"({known})"

    return _SYMBOL.sub(outside, dim.value)
