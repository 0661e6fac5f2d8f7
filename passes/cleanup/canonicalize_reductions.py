"""The cast that a reduction of bools does silently, spelt out."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from sam3x.passes.base import Pass, PassResult, graph_modules

_aten = torch.ops.aten
_REDUCTIONS = {_aten.sum.default, _aten.sum.dim_IntList, _aten.cumsum.default, _aten.prod.default, _aten.prod.dim_int}


class CanonicalizeReductionsPass(Pass):
    """``sum`` of a bool tensor → ``sum`` of its integers: no other format counts bools.

    Upstream's ``get_valid_ratio`` (sam3/model/model_misc.py) sums a mask to find how much of a feature map is valid.
    """

    name = "canonicalize_reductions"

    def call(self, program: ExportedProgram) -> PassResult:
        rewrites = 0
        for _, module in graph_modules(program):
            for node in list(module.graph.nodes):
                if node.op != "call_function" or node.target not in _REDUCTIONS:
                    continue
                source = node.args[0]
                if source.meta["val"].dtype != torch.bool:
                    continue
                dtype = node.meta["val"].dtype
                with module.graph.inserting_before(node):
                    cast = module.graph.call_function(_aten._to_copy.default, (source,), {"dtype": dtype})
                cast.meta["val"] = source.meta["val"].to(dtype)
                node.args = (cast, *node.args[1:])
                rewrites += 1
        return PassResult(rewrites=rewrites)
