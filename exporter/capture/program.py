"""What flows between capture, passes and targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One set of graph inputs with a readable description.

    Attributes:
        branch: e.g. ``"dac=True pre_norm=False"``: the value of every runtime flag, or ``"fixed"``.
        case: sizes and padding, e.g. ``"batch 2, tokens 37, prompt 7, padded"``.
        all_padded: whether every key of some prompt is padding; eager attention may give NaN there.
        large: whether an eager run in float64 takes minutes.
        inputs: graph input name → tensor, flags included as bool tensors, in graph order.
        expected: eager float32 outputs, where they are known already.
        unrounded: the same with the weights as they were, where eager has rounded ones.
    """

    branch: str
    case: str
    inputs: dict[str, Tensor]
    all_padded: bool = False
    large: bool = False
    expected: Mapping[str, Tensor] | None = None
    unrounded: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedProgram:
    """An ``ExportedProgram`` with all that is needed to change it safely.

    Attributes:
        program: functional (no in-place op), near core ATen; ``aten.linear``, ``aten.layer_norm``, ``aten.matmul`` and
            ``aten.scaled_dot_product_attention`` are kept whole; branches are ``torch.ops.higher_order.cond``.
        input_names, output_names: graph order; every input is a tensor, runtime flags are bool.
        dim_names: symbol name in the graph (``s15``) → what it means (``batch``).
        samples: one sample for every combination of runtime flags, at sizes small enough to run after each pass.
        eager: maps named inputs to named outputs with the eager module; the definition everything is compared with.
        exact: the same in float64, of float32 inputs; None: ``eager`` computes in the dtype of the given floats.
        notes: what a user should know, for the manifest.
        ranges: meaning → inclusive sizes, of every dimension that has a meaning.
        halved: the meaning of the dimension that dac halves; None where dac is never on.
        calibration: inputs from which scales of activations are taken; none: each run has its own.
        scaled: whether outputs are judged by their largest value (``sam3x.verify.compare``).
    """

    program: ExportedProgram
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dim_names: Mapping[str, str]
    samples: tuple[Sample, ...]
    eager: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    exact: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    notes: tuple[str, ...] = field(default=())
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    halved: str | None = None
    scaled: bool = False
    calibration: tuple[Mapping[str, Tensor], ...] = ()

    def even_dimension(self, inputs: Mapping[str, Tensor]) -> str | None:
        """The meaning of the dimension whose size must be even with ``inputs``, as dac is on; None where none must."""
        return self.halved if bool(inputs.get("dac", True)) else None

    def with_program(self, program: ExportedProgram) -> CapturedProgram:
        """The same capture around another program."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return CapturedProgram(**{**values, "program": program})


def sync_outputs(program: ExportedProgram) -> None:
    """Let the signature name the nodes that the graph returns, after nodes were replaced."""
    for item, node in zip(program.graph_signature.output_specs, program.graph.output_node().args[0], strict=True):
        if isinstance(node, torch.fx.Node):
            item.arg.name = node.name


def run_program(program: ExportedProgram, inputs: Mapping[str, Tensor], output_names: tuple[str, ...]) -> dict[str, Tensor]:
    """Run an exported program's graph on named inputs, at any size, without torch.export's range guards."""
    signature = program.graph_signature
    state: dict[str, Any] = {**program.state_dict, **program.constants}
    named: Iterator[Any] = iter(program.graph_signature.input_specs)
    args = []
    for item in named:
        if item.target is not None and item.target in state:
            args.append(state[item.target])
        else:
            args.append(inputs[item.arg.name])
    with torch.no_grad():
        outputs = torch.fx.Interpreter(program.graph_module).run(*args)
    user_outputs = [
        value for value, item in zip(outputs, signature.output_specs, strict=True) if item.kind.name == "USER_OUTPUT"
    ]
    return dict(zip(output_names, user_outputs, strict=True))


def erase_dead(module: torch.fx.GraphModule, impure: Callable[[torch.fx.Node], bool] = torch.fx.Node.is_impure) -> bool:
    """Erase what nobody reads and has no effect; True where something was.

    In this graph alone: ``Graph.eliminate_dead_code`` lints, walks every branch below and generates their code again each time.
    """
    dead = False
    for node in reversed(module.graph.nodes):
        if not node.users and not impure(node):
            module.graph.erase_node(node)
            dead = True
    return dead
