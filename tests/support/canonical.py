"""Capture a function, run the pass that makes attention canonical, and check everything a rewrite must keep."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sam3x.capture.program import run_program, sync_outputs
from sam3x.passes.attention.canonicalize_attention import CanonicalizeAttentionPass
from sam3x.passes.base import PassResult, count_ops, graph_modules
from sam3x.passes.cleanup.eliminate_noops import EliminateNoopsPass

aten = torch.ops.aten
SDPA, SOFTMAX = "aten.scaled_dot_product_attention.default", "aten._softmax.default"
DYN = torch.export.Dim.DYNAMIC


class Module(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def capture(module: nn.Module, args: tuple[Tensor, ...], dynamic: tuple | None = None) -> torch.export.ExportedProgram:
    """Export and decompose as exporter/capture/capture.py does."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            shapes = None if dynamic is None else {"args": dynamic} if isinstance(module, Module) else dynamic
            program = torch.export.export(module.eval(), args, dynamic_shapes=shapes, strict=False)
            table = torch.export.default_decompositions()
            for op in (aten.linear, aten.layer_norm, aten.matmul, aten.scaled_dot_product_attention):
                table.pop(op.default, None)
            return program.run_decompositions(table)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def evaluate(program: torch.export.ExportedProgram, args: tuple[Tensor, ...]) -> Tensor:
    """The program's only output for ``args``, in the order of its inputs."""
    names = program.graph_signature.user_inputs
    return run_program(program, dict(zip(names, args, strict=True)), ("output",))["output"]


def to(dtype: torch.dtype, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``args``, the floating ones in ``dtype``."""
    return tuple(arg.to(dtype) if arg.is_floating_point() else arg for arg in args)


def check_sound(program: torch.export.ExportedProgram) -> None:
    """Lint, validate, and a value on every node."""
    sync_outputs(program)
    for _, module in graph_modules(program):
        module.graph.lint()
        for node in module.graph.nodes:
            if node.op in ("call_function", "placeholder") and "_assert_tensor_metadata" not in str(node.target):
                assert "val" in node.meta, node.name
    program.validate()


def check_plain(program: torch.export.ExportedProgram) -> None:
    """Every SDPA node is plain, its operands agree in type and rank, its mask broadcasts."""
    for _, module in graph_modules(program):
        for node in module.graph.nodes:
            if str(node.target) != SDPA:
                continue
            assert node.args[4:] in ((), (0.0, False)) and not node.kwargs.get("enable_gqa")
            assert node.kwargs.get("scale") is None or type(node.kwargs["scale"]) is float
            q, k, v = (item.meta["val"] for item in node.args[:3])
            assert q.dtype == k.dtype == v.dtype and q.dim() == k.dim() == v.dim() == 4
            assert list(q.shape[:-2]) == list(k.shape[:-2]) == list(v.shape[:-2])
            mask = node.args[3].meta["val"] if len(node.args) > 3 and node.args[3] is not None else None
            assert mask is None or mask.dtype in (torch.bool, q.dtype)


def check_numbers(module: nn.Module, program: torch.export.ExportedProgram, args: tuple[Tensor, ...]) -> None:
    """No further from eager float64 than 4 times eager's own distance."""
    with torch.no_grad():
        eager = module(*args)
        exact = copy.deepcopy(module).double()(*to(torch.float64, args))
    got = evaluate(program, args)
    assert got.shape == eager.shape and got.dtype == eager.dtype
    defined = ~exact.isnan()  # a plain softmax gives NaN where a row's keys are all hidden with -inf; SDPA gives zeros
    own = (eager.double() - exact)[defined].abs().max().item()
    distance = (got.double() - exact)[defined].abs().max().item()
    floor = {torch.float32: 1e-6, torch.float64: 1e-12}.get(eager.dtype, 1e-3)
    assert distance <= 4 * own + floor, (distance, own)
    assert not got.isnan().any()


def run_pass(
    module: nn.Module, args: tuple[Tensor, ...], dynamic: tuple | None = None, *, rewrites: int = 1, noops: bool = True
) -> tuple[torch.export.ExportedProgram, PassResult]:
    """Capture, run, and check everything a rewrite must keep."""
    program = capture(module, args, dynamic)
    if noops:
        EliminateNoopsPass().call(program)
    guards = len(_guards(program))
    result = CanonicalizeAttentionPass().call(program)
    counts = count_ops(program)
    assert result.rewrites == rewrites, result.match_failures
    assert counts.get(SDPA, 0) == rewrites and SOFTMAX not in counts, (counts, result.match_failures)
    assert result.modified and not result.match_failures
    assert len(_guards(program)) == guards
    check_sound(program)
    check_plain(program)
    check_numbers(module, program, args)
    again = CanonicalizeAttentionPass().call(program)
    assert not again.modified and not again.rewrites
    return program, result


def _guards(program: torch.export.ExportedProgram) -> list:
    for node in program.graph.nodes:
        fake = torch._guards.detect_fake_mode(node.meta.get("val"))
        if fake is not None and fake.shape_env is not None:
            return list(fake.shape_env.guards)
    return []


def sdpa_of(program: torch.export.ExportedProgram) -> torch.fx.Node:
    """The program's first attention."""
    return next(node for _, module in graph_modules(program) for node in module.graph.nodes if str(node.target) == SDPA)
