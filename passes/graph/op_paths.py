"""Readable names for the operations of a captured graph: ``layers.3.linear2``, ``layers.0.self_attn.attention``.

``--fp32-ops`` and ``sam3x doctor`` speak of operations by these names.
"""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from sam3x.passes.base import MatchFailure
from sam3x.passes.graph.aten_nodes import SDPA
from sam3x.passes.graph.cond_graph import is_cond, placeholders, read_cond

ALIASES = {"softmax": "attention", "scaled_dot_product_attention": "attention"}
"""Other words for an operation; the softmax of canonical attention is inside it."""

IDLE = "names no operation of this graph"
"""Why a name of an operation changes nothing, where several graphs are given it."""


def op_paths(program: ExportedProgram) -> dict[Node, str]:
    """Every ``call_function`` of the graph and of its branches → its path. Operations that share one stand or fall together.

    What reads a weight is named after the module that owns it, anything else after the layer that it follows.
    """
    parameters = program.graph_signature.inputs_to_parameters
    targets = {name: target for name, target in parameters.items() if "." in target}  # what passes add is of no module
    owners = {
        node: _module(targets[node.name]) for node in program.graph.nodes if node.op == "placeholder" and node.name in targets
    }
    paths: dict[Node, str] = {}
    _walk(program.graph_module, owners, paths, "")
    return paths


def _module(target: str) -> str:
    """``encoder.layers.0.self_attn.in_proj_weight`` → ``layers.0.self_attn.in_proj``.

    ``encoder`` is the fusion encoder, ``module`` another component of an image model.
    """
    module = re.sub(r"[._](weight|bias)$", "", target)
    return re.sub(r"^(encoder|module)\.", "", module)


def _walk(module: GraphModule, owners: dict[Node, str], paths: dict[Node, str], scope: str) -> str:
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        owned = [owners[item] for item in node.all_input_nodes if item in owners]
        if is_cond(node):
            cond = read_cond(module, node)
            for branch in cond.branches:
                inner = {}
                for placeholder, operand in zip(placeholders(branch), cond.operands, strict=True):
                    if operand in owners:
                        inner[placeholder] = owners[operand]
                scope = _walk(branch, inner, paths, scope)
            paths[node] = f"{_layer(scope)}.cond"
        elif owned and all(item in owners for item in node.all_input_nodes):
            owners[node] = paths[node] = owned[0]  # a part of a weight is a weight
        elif owned:
            scope = paths[node] = owned[0]
        elif node.target is SDPA:
            paths[node] = f"{scope.rpartition('.')[0]}.attention".lstrip(".")
        else:
            paths[node] = f"{_layer(scope)}.{op_name(node)}".lstrip(".")
    return scope


def _layer(scope: str) -> str:
    """``layers.0.self_attn.in_proj`` → ``layers.0``, ``blocks.7.mlp.fc1`` → ``blocks.7``, ``head.proj`` → ``head``."""
    found = re.match(r"(.*?layers\.\d+|(?:.*?\.)?\d+)(\.|$)", scope)
    return found[1] if found else scope.rpartition(".")[0]


def op_name(node: Node) -> str:
    """``linear`` for ``aten.linear.default``; canonical attention is ``attention``."""
    target: Any = node.target
    name = (
        target._schema.name.rpartition("::")[2]
        if isinstance(target, torch._ops.OpOverload)
        else getattr(target, "__name__", "")
    )
    return ALIASES.get(name, name) if target is not operator.getitem else "getitem"


def matching(paths: dict[Node, str], wanted: Sequence[str]) -> tuple[set[Node], list[str]]:
    """The nodes that ``wanted`` names, and those names that match nothing.

    A name is an operation (``layer_norm``), a path, the beginning of one (``layers.3``), or a pattern with ``*``.
    """
    nodes: set[Node] = set()
    idle = []
    for name in wanted:
        word = ALIASES.get(name, name)
        found = {node for node, path in paths.items() if _matches(word, node, path)}
        nodes |= found
        if not found:
            idle.append(name)
    return nodes, idle


def _matches(word: str, node: Node, path: str) -> bool:
    return op_name(node) == word or path == word or path.startswith(f"{word}.") or fnmatch.fnmatchcase(path, word)


def idle(program: ExportedProgram, wanted: Sequence[str]) -> tuple[MatchFailure, ...]:
    """The names in ``wanted`` that match nothing."""
    return tuple(MatchFailure(node=name, reason=IDLE) for name in matching(op_paths(program), wanted)[1])


def float_ops(program: ExportedProgram) -> Iterator[tuple[Node, str]]:
    """Operations that return floating-point tensors, with their paths."""
    for node, path in op_paths(program).items():
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield node, path
