"""Conditionals become data flow: if-conversion (Allen, Kennedy, Porterfield and Warren, 1983) for ``torch.cond``.

Both branches run and ``where`` on the predicate picks a result. That pays only where the branches' own work is cheap; a
product, an attention or a convolution is never computed twice.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._sympy.symbol import SymT, symbol_is_type

from sam3x.passes.base import MatchFailure, NoMatchError, Pass, PassResult
from sam3x.passes.branches.row_mask import mask_rows
from sam3x.passes.graph.aten_nodes import HEAVY, aten, expression, same_shape
from sam3x.passes.graph.cond_graph import (
    ASSERTIONS,
    Cond,
    behind_copies,
    cond_places,
    inline,
    is_cond,
    outputs,
    own_branches,
    placeholders,
    read_cond,
    replace_results,
    sweep,
)
from sam3x.passes.graph.emitter import Emitter

_CHEAP_NAMES = (
    "alias amax amin arange argmax argmin as_strided cat clone constant_pad_nd contiguous cumsum detach diagonal embedding_bag "
    "empty_like expand flip full full_like layer_norm lift_fresh_copy max mean min native_group_norm native_layer_norm narrow "
    "ones ones_like permute repeat reshape roll scalar_tensor select slice slice_scatter select_scatter softmax _softmax "
    "_log_softmax split split_with_sizes squeeze stack sum sym_numel sym_size sym_stride to _to_copy transpose tril triu "
    "unbind unsqueeze _unsafe_view var view where zeros zeros_like rms_norm group_norm"
)
_CHEAP = set(_CHEAP_NAMES.split()) - {"embedding_bag", "as_strided"}
_TRAPS = {"div", "floor_divide", "remainder", "fmod"}


class IfConvertPass(Pass):
    """A conditional whose branches are cheap becomes ``where``; one that only chooses a number of rows becomes a row mask.

    The rows: one branch returns the first rows of a tensor, the other all of them, a size that only a run can tell. Then
    everything that works on those rows runs at full size, and the ``cat`` that puts the untouched rest back picks by row. Every
    operator in between is proven not to mix rows (``row_mask``). Refused, with the reason: heavy operators, effects, traps,
    mixed rows.

    Args:
        rows_only: leave every conditional but those that choose a number of rows.
    """

    name = "if_convert"

    def __init__(self, *, rows_only: bool = False) -> None:
        self.rows_only = rows_only
        self.name = "if_convert_rows" if rows_only else "if_convert"

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites = 0
        failures: dict[str, str] = {}
        # a mask of rows needs the conditionals on its way gone, and so does a branch that holds one: until nothing moves
        moved = True
        while moved:
            moved = False
            for name, module, node in list(cond_places(program)):
                if self.rows_only and not node.meta.get("unbacked_bindings"):
                    continue
                reason = _convert(module, node)
                if reason is None:
                    rewrites, moved = rewrites + 1, True
                    failures.pop(name, None)
                    sweep(program.graph_module)
                    break
                failures[name] = reason
        left = {name for name, _, _ in cond_places(program)}
        reasons = tuple(MatchFailure(node=name, reason=reason) for name, reason in failures.items() if name in left)
        return PassResult(rewrites=rewrites, match_failures=reasons)


def _convert(module: GraphModule, node: Node) -> str | None:
    """Convert one conditional; the reason where it stays."""
    cond = read_cond(module, node)
    for branch in cond.branches:
        reason = costly(branch)
        if reason is not None:
            return reason
    if not isinstance(cond.predicate, Node) or not isinstance(cond.predicate.meta["val"], torch.Tensor):
        return "the predicate is no tensor"
    if not all(isinstance(value, Node) for branch in cond.branches for value in outputs(branch)):
        return "a branch returns a number that is no tensor"
    for branch in cond.branches:
        for inner, operand in zip(placeholders(branch), cond.operands, strict=True):
            if _counts_on_size(inner.meta.get("val"), operand):
                return f"operand '{inner.name}' has a size that depends on a branch, and this branch counts on it"
    if node.meta.get("unbacked_bindings"):
        try:
            mask_rows(module, cond)
        except NoMatchError as reason:
            return str(reason)
        return None
    return _select(module, cond)


def _counts_on_size(inner: Any, operand: Any) -> bool:
    """Whether a branch knows more than the graph around it of a size that only a run can tell."""
    outer = operand.meta.get("val") if isinstance(operand, Node) else operand
    if not isinstance(inner, torch.Tensor) or not isinstance(outer, torch.Tensor):
        return False
    sizes = [expression(size) for size in outer.shape]
    unbacked = any(symbol_is_type(symbol, SymT.UNBACKED_INT) for size in sizes for symbol in size.free_symbols)
    return unbacked and sizes != [expression(size) for size in inner.shape]


def _select(module: GraphModule, cond: Cond) -> str | None:
    pairs = list(zip(*(outputs(branch) for branch in cond.branches), strict=True))
    for true, false in pairs:
        a, b = true.meta["val"], false.meta["val"]
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            return "a branch returns a number that is no tensor"
        if a.dtype is not b.dtype or not same_shape(a.shape, b.shape):
            return f"the branches return {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
    own_branches(module)
    emit = Emitter(module, cond.node)
    predicate = cond.predicate
    if predicate.meta["val"].dim():
        predicate = emit(aten.reshape.default, predicate, [])
    results = [inline(module, branch, cond.operands, cond.node) for branch in cond.branches]
    chosen: list[Node] = []
    readers = {user.args[1] for user in cond.node.users}
    for index, values in enumerate(zip(*results, strict=True)):
        true, false = (behind_copies(value) for value in values)
        chosen.append(emit(aten.where.self, predicate, true, false) if index in readers else true)
    replace_results(cond.node, chosen)
    return None


def costly(branch: GraphModule) -> str | None:
    """Why a branch may not run where its conditional would have skipped it; None when it may."""
    for node in branch.graph.nodes:
        if node.op != "call_function":
            continue
        target: Any = node.target
        if is_cond(node):
            return "a branch holds a conditional that stays"
        if target in ASSERTIONS:
            return f"a branch checks its values ({target}), which must not happen in the other"
        if target in HEAVY:
            return f"a branch runs {target}, which would be computed twice: run narrow_cond first"
        if not isinstance(target, torch._ops.OpOverload):
            if isinstance(target, torch._ops.HigherOrderOperator):
                return f"a branch runs {target}, which is not known to be cheap"
            if target in (operator.floordiv, operator.mod, operator.truediv) and not isinstance(node.args[1], (int, float)):
                return "a branch divides by a size, which may be zero where the other branch runs"
            continue  # arithmetic on sizes
        name = target._schema.name.partition("::")[2]
        if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
            return f"a branch runs {target}, which has an effect"
        if target.namespace != "aten" or not (torch.Tag.pointwise in target.tags or name in _CHEAP):
            return f"a branch runs {target}, which is not known to be cheap"
        value = node.meta.get("val")
        if name in _TRAPS and isinstance(value, torch.Tensor) and not value.dtype.is_floating_point:
            return f"a branch divides integers ({target}), which may trap where the other branch runs"
    return None
