"""Module in, functional near-core-ATen ``ExportedProgram`` out, its branches as ``torch.cond``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from sam3x.capture.decompose import decomposed
from sam3x.capture.inline import inline_layers
from sam3x.capture.program import CapturedProgram
from sam3x.capture.refusal import refusal
from sam3x.capture.samples import branch_values, make_inputs, samples_for, trace_sizes
from sam3x.capture.watch import traced
from sam3x.errors import CaptureError
from sam3x.fusion.ambient import settled
from sam3x.fusion.dimensions import dims_of
from sam3x.fusion.encoder import FusionEncoder
from sam3x.fusion.layer_op import LAYER_OP
from sam3x.fusion.layer_template import LayerTemplate, Operand, kind_of, trace_template
from sam3x.spec import ExportSpec

_aten = torch.ops.aten


@settled()
def capture(source: nn.Module | Sequence[nn.Module], spec: ExportSpec) -> CapturedProgram:
    """``capture_encoder`` of a module, or a list of layers.

    Raises:
        SpecError, SourceError: the request does not fit the module.
    """
    return capture_encoder(FusionEncoder(source, spec))


def capture_encoder(encoder: FusionEncoder) -> CapturedProgram:
    """Export ``encoder`` with its runtime flags as ``torch.cond`` and its ranges as dynamic dimensions.

    Raises:
        CaptureError: torch.export refused the module, or a dimension that must be dynamic was baked in.
    """
    spec = encoder.spec
    names, flags = encoder.input_names, encoder.flag_names
    plain = tuple(name for name in names if name not in flags)
    sizes = trace_sizes(spec)
    inputs = make_inputs(plain, spec, encoder.d_model, sizes, spec.seed)
    label, values = branch_values(flags, spec, len(encoder.layers))[0]
    example = tuple({**inputs, **values}.values())
    ranges = spec.ranges
    dynamic = []
    for name, tensor in zip(names, example, strict=True):
        dims = dims_of(name, tensor.dim())
        dynamic.append({i: Dim.DYNAMIC for i, dim in enumerate(dims) if dim and ranges[dim][0] != ranges[dim][1]} or None)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention's fused kernel is opaque to every pass

    def run() -> ExportedProgram:
        program = torch.export.export(encoder, example, dynamic_shapes=(tuple(dynamic),), strict=False)
        if not _only_layers(program):
            program = decomposed(program)
        inline_layers(program, _templates(encoder, program))
        free_layouts(program.graph_module)
        return program

    remedy = "Fix that size (for instance --tokens 5184), fix the flag (--dac off), or leave the input out (--inputs)."
    traced_at = {name: getattr(sizes, name) for name, (low, high) in ranges.items() if low != high}
    try:
        program = traced(encoder, run, traced_at, lambda error: refusal(f"the encoder at {sizes} ({label})", error, remedy))
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    placeholders = user_placeholders(program)
    dim_names = _dim_names(placeholders, names, dynamic)
    for node, name in zip(placeholders, names, strict=True):
        rename_input(program, node, name)
    program.graph_module.recompile()
    zeros = "a row whose keys are all masked gets zeros from the attention, as torch's scaled_dot_product_attention gives"
    notes = [*spec.notes, zeros]
    if encoder.sequence_first:
        notes.append(
            "the module's attention has batch_first=False; the artifact takes (batch, tokens, C), and dac halves the tokens"
        )
    if not all(encoder.stock):
        odd = sorted({type(layer).__name__ for layer, stock in zip(encoder.layers, encoder.stock, strict=True) if not stock})
        notes.append(f"layers with their own forward, captured whole in every branch: {', '.join(odd)}")
    return CapturedProgram(
        program=program,
        input_names=names,
        output_names=encoder.output_names,
        dim_names=dim_names,
        samples=tuple(samples_for(names, flags, spec, encoder.d_model, len(encoder.layers), [sizes])),
        eager=encoder.eager,
        notes=tuple(notes),
        ranges=spec.ranges,
        halved=None if spec.dac is False else spec.halved,
    )


def _only_layers(program: ExportedProgram) -> bool:
    """Whether nothing stands around the layers' operators but sizes and what tracing assumed of them: nothing to decompose."""
    plain = (LAYER_OP, _aten.sym_size.int, _aten._assert_scalar.default)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return all(target in plain or getattr(target, "__module__", "") == "_operator" for target in calls)


def _templates(encoder: FusionEncoder, shell: ExportedProgram) -> dict[int, LayerTemplate]:
    """Trace each kind of layer once; a layer with its own forward may read ``layer_idx``, so it is a kind of its own."""
    kinds: dict[object, LayerTemplate] = {}
    result = {}
    for node in shell.graph.nodes:
        if node.target is not LAYER_OP:
            continue
        operands, _, index = node.args
        layer, call = encoder.layers[index], encoder.calls[index]
        shapes = [(str(n.meta["val"].dtype), tuple(map(str, n.meta["val"].shape))) for n in operands]
        kind: object = kind_of(layer, (call.names, call.fixed, shapes)) if encoder.stock[index] else index
        if kind not in kinds:
            inputs = [_operand(name, n.meta["val"], encoder.spec) for name, n in zip(call.names, operands, strict=True)]
            kinds[kind] = trace_template(layer, encoder.layer_calls(index), inputs, decomposed)
        result[index] = kinds[kind]
    return result


def free_layouts(root: torch.fx.GraphModule) -> None:
    """``view`` → ``reshape``, branches too: a pass may change a tensor's strides, never its elements.

    Complex numbers stay views: back ends know those alone, and no pass moves them.
    """
    for module in root.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                views = (_aten.view.default, _aten._unsafe_view.default)
                if node.target in views and not node.meta["val"].is_complex():
                    node.target = _aten.reshape.default
            module.recompile()


def _operand(name: str, value: torch.Tensor, spec: ExportSpec) -> Operand:
    by_flag = spec.dac == "runtime" or (spec.dac is True and spec.pre_norm in ("runtime", "per-layer"))  # post-norm ignores dac
    halved = ("batch", "tokens")[spec.dac_dim] if by_flag else None
    size = {"batch": 6, "tokens": 22, None: 0}[halved]
    dims = dims_of(name, value.dim())
    fixed = [i for i, meaning in enumerate(dims) if meaning and meaning == halved and isinstance(value.shape[i], int)]
    return Operand(value=value, freed=dict.fromkeys(fixed, size))


def user_placeholders(program: ExportedProgram) -> list[torch.fx.Node]:
    """The placeholders that are inputs, not weights, in graph order."""
    wanted = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]


def _dim_names(placeholders: list, names: tuple[str, ...], dynamic: list) -> dict[str, str]:
    """Symbol → meaning; refuses a dimension that was asked to be dynamic and came out fixed."""
    found: dict[str, str] = {}
    for node, name, dims in zip(placeholders, names, dynamic, strict=True):
        for index in dims or ():
            meaning = dims_of(name, node.meta["val"].dim())[index]
            size = node.meta["val"].shape[index]
            if isinstance(size, int):
                raise CaptureError(
                    f"'{name}' dimension {index} ({meaning}) came out fixed at {size}: the module bakes it in",
                    remedy=(
                        f"Fix it with --{str(meaning).replace('_', '-')} {size}, or make the module read it from the tensor's "
                        "shape."
                    ),
                )
            found[str(size)] = str(meaning)
    return found


def rename_input(program: ExportedProgram, node: torch.fx.Node, name: str) -> None:
    """Give a placeholder the public input's name, in the graph and in the signature. Call ``recompile`` afterwards."""
    for item in program.graph_signature.input_specs:
        if item.arg.name == node.name:
            item.arg.name = name
    node.name = node.target = name
