"""Traces of Meta's layers that tests of everything behind the capture share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest import mock

from torch import nn
from torch.export import ExportedProgram

from sam3x.capture import capture
from sam3x.fusion.encoder import FusionEncoder
from sam3x.fusion.layer_template import LayerTemplate, Operand, kind_of, trace_template

KNOWN: dict[str, tuple[nn.Module, LayerTemplate]] = {}
"""Kind of layer and of call → the layer, which lives on because the kind goes by ``id`` in places, and its trace."""
_templates = capture._templates


def share(on: bool) -> None:
    """Trace each kind of layer of torch's and Meta's own classes once a process, or anew for each encoder as users' exports do.

    Tracing takes four fifths of the export of a small encoder.
    """
    capture._templates = _shared if on else _templates


def _shared(encoder: FusionEncoder, shell: ExportedProgram) -> dict[int, LayerTemplate]:
    def trace(layer: nn.Module, calls: Sequence[Callable], operands: Sequence[Operand], core: Callable) -> LayerTemplate:
        if any(not type(module).__module__.startswith(("torch.", "sam3.")) for module in layer.modules()):
            return trace_template(layer, calls, operands, core)
        call = next(encoder.calls[index] for index, item in enumerate(encoder.layers) if item is layer)
        examples = [(tuple(value.shape), value.dtype, str(dims)) for value, dims in (item.example() for item in operands)]
        kind = kind_of(layer, (call.names, call.fixed, encoder.spec.dac_dim, len(calls), examples))
        if kind not in KNOWN:
            KNOWN[kind] = layer, trace_template(layer, calls, operands, core)
        return KNOWN[kind][1]

    with mock.patch.object(capture, "trace_template", trace):
        return _templates(encoder, shell)
