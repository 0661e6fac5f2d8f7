"""How a delegate of ExecuTorch sums float16 products on this machine."""

from __future__ import annotations

import functools

from sam3x.targets.executorch.delegates import partitioners
from sam3x.targets.quiet import suppressed_output

_TERMS = 32768
"""Ones to add: float16 has the number, but a sum kept in it stops at 2,048, as do eight of them side by side."""


@functools.cache
def half_sums(delegate: str) -> bool:
    """Whether its kernels keep sums in float16, as Arm's do and x86's with ``avx512_fp16``: asked of one product, run here.

    Args:
        delegate: one that the runtime installed here has.
    """
    import torch

    with suppressed_output():
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime

        linear = torch.nn.Linear(_TERMS, 1, bias=False, dtype=torch.float16)
        torch.nn.init.ones_(linear.weight)
        ones = torch.ones(1, _TERMS, dtype=torch.float16)
        edge = to_edge_transform_and_lower(torch.export.export(linear, (ones,)), partitioner=partitioners(delegate, "fp16"))
        (total,) = Runtime.get().load_program(edge.to_executorch().buffer).load_method("forward").execute([ones])  # type: ignore[union-attr]
    return int(total) < _TERMS
