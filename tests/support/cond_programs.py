"""Small programs with ``torch.cond``, and what every pass over them must keep."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sam3x.capture.program import run_program, sync_outputs
from sam3x.passes.base import count_ops, graph_modules
from sam3x.passes.pipeline import _private_copy

DYN = torch.export.Dim.DYNAMIC
aten = torch.ops.aten
COND, LINEAR = "cond", "aten.linear.default"
SDPA, LAYER_NORM = "aten.scaled_dot_product_attention.default", "aten.layer_norm.default"


def cond(flag: Tensor, true: Callable[..., Any], false: Callable[..., Any], *operands: Tensor) -> Any:
    """The operator itself: ``torch.cond`` starts dynamo for each call."""
    many = lambda f: lambda *a: r if isinstance(r := f(*a), tuple) else (r,)  # noqa: E731
    results = torch.ops.higher_order.cond(flag, many(true), many(false), operands)
    return results if len(results) > 1 else results[0]


class Program(nn.Module):
    """A function of tensors and named weights; ``weights`` are its parameters."""

    def __init__(self, function: Callable[..., Any], **weights: Tensor) -> None:
        super().__init__()
        self.function = function
        self.names = tuple(weights)
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args, **{name: getattr(self, name) for name in self.names})


def capture(module: nn.Module, args: tuple[Tensor, ...], dynamic: Mapping[int, dict] | None = None) -> ExportedProgram:
    """Export and decompose as exporter/capture/capture.py does; ``dynamic``: position → dynamic dimensions."""
    shapes = None if dynamic is None else (tuple(dynamic.get(i) for i in range(len(args))),)
    with torch.no_grad():
        program = torch.export.export(module.eval(), args, dynamic_shapes=shapes, strict=False)
        table = torch.export.default_decompositions()
        for op in (aten.linear, aten.layer_norm, aten.matmul, aten.scaled_dot_product_attention):
            table.pop(op.default, None)
        program = program.run_decompositions(table)
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                if node.target in (aten.view.default, aten._unsafe_view.default):
                    node.target = aten.reshape.default
            part.recompile()
    return program


def evaluate(program: ExportedProgram, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    names = tuple(f"output_{i}" for i in range(len(program.graph_signature.user_outputs)))
    return list(run_program(program, inputs, names).values())


def named(program: ExportedProgram, args: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(program.graph_signature.user_inputs, args, strict=True))


def flag_values(args: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The arguments with every combination of their bool scalars."""
    places = [i for i, arg in enumerate(args) if arg.dtype is torch.bool and arg.dim() == 0]
    for values in itertools.product((False, True), repeat=len(places)):
        changed = list(args)
        for place, value in zip(places, values, strict=True):
            changed[place] = torch.tensor(value)
        yield tuple(changed)


def check_sound(program: ExportedProgram) -> None:
    """Lint, validate, a value on every node, branches that take and return what their conditional does."""
    sync_outputs(program)
    for _, module in graph_modules(program):
        module.graph.lint()
        module.recompile()
        for node in module.graph.nodes:
            if node.op in ("call_function", "placeholder") and "_assert" not in str(node.target):
                assert "val" in node.meta, node.name
            if node.target is torch.ops.higher_order.cond:
                for branch in node.args[1:3]:
                    part = getattr(module, branch.target)
                    assert sum(item.op == "placeholder" for item in part.graph.nodes) == len(node.args[3])
                    assert len(part.graph.output_node().args[0]) == len(node.meta["val"])
    program.validate()


def check_numbers(
    before: ExportedProgram,
    after: ExportedProgram,
    args: Sequence[Tensor],
    *,
    exact: bool,
    fixed: Mapping[str, bool] | None = None,
) -> None:
    """Equal in every branch: bit for bit, or no further from float64 than 4 times the program before."""
    for values in flag_values(args):
        inputs = named(before, values)
        if any(bool(inputs[name]) is not value for name, value in (fixed or {}).items()):
            continue
        old, new = evaluate(before, inputs), evaluate(after, inputs)
        assert len(old) == len(new)
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            assert a.shape == b.shape and a.dtype is b.dtype
            if exact or not a.is_floating_point():
                assert torch.equal(a, b), (a - b).abs().max()
                continue
            reference = evaluate(_double(before), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})[
                index
            ]
            own, far = ((x.double() - reference).abs().max().item() if x.numel() else 0.0 for x in (a, b))
            assert far <= 4 * own + 1e-6, (far, own)


def _double(program: ExportedProgram) -> ExportedProgram:
    copied = _private_copy(program)
    copied._state_dict = {k: v.double() if v.is_floating_point() else v for k, v in program.state_dict.items()}
    return copied


def private(program: ExportedProgram) -> ExportedProgram:
    sync_outputs(program)  # as the pipeline does after a pass
    return _private_copy(program)


def ops(program: ExportedProgram, name: str) -> int:
    return count_ops(program).get(name, 0)
