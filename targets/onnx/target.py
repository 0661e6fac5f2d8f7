"""ONNX, opset 18, standard domain: torch.onnx's converter, readable names, ONNX Runtime to run it."""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from sam3x.errors import LoweringError
from sam3x.spec import Branches
from sam3x.targets.base import AttentionMemory, Float32Operations, Numerics, Target, TargetStatus
from sam3x.targets.onnx.openvino import OpenVinoRunner
from sam3x.targets.quiet import errors_only
from sam3x.targets.triton import DESCRIPTION, Layout, model_path, write_config

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from sam3x.capture.program import CapturedProgram
    from sam3x.passes.base import Pass
    from sam3x.targets.onnx import device as onnx_device
    from sam3x.targets.onnx import session as onnx_session
    from sam3x.verify.record import Runner

_EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime")
_CHATTY = ("onnxscript", "torch.onnx._internal.exporter._core")  # a warning for each Split, each node without a stack trace


UNLIMITED = 2**62
"""Bytes of scores where nothing is in tiles."""

Attention = Literal["portable", "ort", "decomposed"]


FORMS: dict[str, tuple[Attention, Branches]] = {
    "cpu": ("portable", "cond"),
    "cuda": ("ort", "select"),
    "tensorrt": ("decomposed", "select"),
    "webgpu": ("ort", "select"),
    "coreml": ("decomposed", "select"),
    "openvino": ("decomposed", "select"),
    "directml": ("ort", "select"),
}
"""Runtime → attention and branches that it runs best. Tiles in loops, which keep memory small, are for the CPU alone: a device
waits for each step, or leaves the loop to the CPU."""


class OnnxOptions(AttentionMemory, Float32Operations):
    """Options of an export to ONNX.

    Attributes:
        runtime: what is to run the file (``--for``), which chooses ``attention`` and ``branches`` (``FORMS``) where the request
            names none, and whether attention and feed-forward blocks are in tiles.
        external_data: write weights beside the graph file; past 1 GB that happens anyway.
        attention: ``portable`` (opset 18, a tile of queries at a time), ``ort`` (ONNX Runtime's own operator) or
            ``decomposed`` (plain products, all scores in memory).
        precision: what is computed in. ``fp16``: products, convolutions and attention, and what lies between them; sums (norms,
            softmax), positions, boxes and scores stay float32. ``int8``: products with constants, a scale an output channel,
            activations as they come. Inputs and outputs stay float32.
        weights: how the file stores weights that are rounded to less (``int8``: a scale an output channel); inputs, outputs
            and arithmetic stay float32.
        calibrate: a folder of pictures; with ``int8``, whose scales of activations are then constants: of what these pictures
            and the inputs of verification give, where no loop or conditional stands around the product. Convolutions are then
            in ``int8``, too.
        attention_memory: a whole number and a unit, as in ``256MB``: what the scores of one attention may take. ``ort`` needs
            it only for masked attention over many keys, ``decomposed`` not at all.
        layout: ``triton``: the folder is a model repository for Triton Inference Server.
    """

    runtime: Literal["cpu", "cuda", "tensorrt", "webgpu", "coreml", "openvino", "directml"] = Field(
        "cpu",
        description="the runtime whose best form the file has: attention, branches, tiles.",
        json_schema_extra={"option": "for"},
    )
    external_data: bool = Field(False, description="weights beside the graph file.")
    attention: Attention = Field(
        "portable",
        description="opset 18 in tiles (portable), ONNX Runtime's operator, or plain. Left out: what --for runs best.",
    )
    precision: Literal["fp32", "fp16", "int8"] = Field(
        "fp32", description="of the arithmetic (fp16: sums and boxes stay fp32; int8: linears)."
    )
    weights: Literal["fp32", "fp16", "int8"] = Field("fp32", description="storage alone; what computes stays float32.")
    calibrate: str = Field(
        "",
        description="folder of pictures from which int8 takes the scales of activations, once, convolutions' too; "
        "left out: each run has its own, and convolutions are float32.",
        json_schema_extra={"metavar": "DIR"},
    )
    layout: Layout = Field("flat", description=DESCRIPTION)

    @model_validator(mode="before")
    @classmethod
    def _form(cls, values: Any) -> Any:
        form = FORMS.get(str(values.get("runtime", "cpu"))) if isinstance(values, Mapping) else None
        return values if form is None or "attention" in values else {**values, "attention": form[0]}

    @property
    def tiled(self) -> bool:
        """Whether what takes much memory is computed in tiles."""
        return self.runtime == "cpu"

    @model_validator(mode="after")
    def _one_of_both(self) -> OnnxOptions:
        if self.precision != "fp32" and self.weights != "fp32":
            raise ValueError(f"precision {self.precision} stores its weights so; leave weights out")
        if self.calibrate and self.precision != "int8":
            raise ValueError("calibrate: pictures give scales of int8; add --precision int8, or leave --calibrate out")
        return self


def _torchlib() -> Any:
    """torch's converter functions. A registry to add to is a copy."""
    return _read_torchlib("torchvision" in sys.modules)  # its operators have converters once it is imported


@functools.cache
def _read_torchlib(torchvision: bool) -> Any:
    """Takes 0.3 s."""
    from torch.onnx._internal.exporter import _registration

    return _registration.ONNXRegistry.from_torchlib()


class OnnxTarget(Target):
    """``fusion_encoder.onnx`` with ``If`` for the branches."""

    name = "onnx"
    suffix = ".onnx"
    opset = 18
    options_type = OnnxOptions

    def availability(self) -> TargetStatus:
        missing = [name for name in _EXPORT_PACKAGES if importlib.util.find_spec(name) is None]
        detail = f"missing {', '.join(missing)}" if missing else "exports and runs"
        if missing and "onnxruntime" not in missing:
            detail = f"runs artifacts; to export, {detail}"
        return TargetStatus(name=self.name, available=not missing, detail=detail, install='pip install "sam3x[onnx]"')

    def legalization_passes(self, options: OnnxOptions) -> tuple[Pass, ...]:
        from torch.onnx._internal.exporter import _decomp

        from sam3x.passes.branches.fuse_alternatives import FuseAlternativesPass
        from sam3x.passes.branches.unslice_rows import UnsliceRowsPass
        from sam3x.passes.cleanup.insert_type_promotion import InsertTypePromotionPass
        from sam3x.passes.cleanup.legalize_operators import LegalizeOperatorsPass
        from sam3x.passes.decompose.decompose_roi_align import DecomposeRoiAlignPass
        from sam3x.passes.linear.tile_feed_forward import TILED_FEED_FORWARD, TileFeedForwardPass
        from sam3x.passes.precision.keep_float32 import FLOAT32_WEIGHT
        from sam3x.targets.onnx import attention as onnx_attention
        from sam3x.targets.onnx import loop as onnx_loop

        words = set(_decomp.get_onnx_implemented_overloads(_torchlib()))
        table = _decomp.create_onnx_friendly_decomposition_table(words)
        own = {*onnx_attention.operators(), TILED_FEED_FORWARD, FLOAT32_WEIGHT}
        tiled = options.tiled and options.attention != "decomposed"
        budget = options.attention_bytes if options.tiled else UNLIMITED
        return (
            *([] if options.attention == "ort" else [DecomposeRoiAlignPass()]),  # TensorRT-RTX has no such operator
            *onnx_attention.passes(options.attention, budget, _precision_passes(options)),
            UnsliceRowsPass(),
            FuseAlternativesPass(),
            *([TileFeedForwardPass(onnx_loop.TILE_BYTES)] if tiled else []),
            LegalizeOperatorsPass(
                lambda op: op in words or op in own or "assert" in op.name() or "sym_constrain" in op.name(), table
            ),
            InsertTypePromotionPass(),
        )

    def numerics(self, options: OnnxOptions) -> Numerics:
        weights = None if options.weights == "fp32" else options.weights
        row_scales, calibrated = options.precision != "int8", bool(options.calibrate)
        return replace(super().numerics(options), weights=weights, row_scales=row_scales, int8_convolutions=calibrated)

    def branches_of(self, options: OnnxOptions) -> Branches:
        return FORMS[options.runtime][1]

    def check(self, ranges: Mapping[str, tuple[int, int]], options: OnnxOptions) -> None:
        options.refuse_idle(("fp32",), "Choose --precision fp16 or int8.")

    def file_name(self, stem: str, options: OnnxOptions) -> str:
        return model_path(stem, self.suffix) if options.layout == "triton" else f"{stem}{self.suffix}"

    def lower(self, captured: CapturedProgram, path: Path, options: OnnxOptions) -> dict[str, Any]:
        import torch
        from torch.onnx._internal.exporter import _core, _fx_passes

        from sam3x.targets.onnx import attention as onnx_attention
        from sam3x.targets.onnx import calibrate as onnx_calibrate
        from sam3x.targets.onnx import feed_forward as onnx_feed_forward
        from sam3x.targets.onnx import file as onnx_file
        from sam3x.targets.onnx import gelu as onnx_gelu
        from sam3x.targets.onnx import linear as onnx_linear
        from sam3x.targets.onnx import norm as onnx_norm
        from sam3x.targets.onnx import optimize as onnx_optimize
        from sam3x.targets.onnx import quantize as onnx_quantize
        from sam3x.targets.onnx import weights as onnx_weights

        try:
            # the public torch.onnx.export decomposes, which traces every torch.cond again; this program is decomposed already
            with torch.no_grad(), errors_only(*_CHATTY):
                _fx_passes.remove_assertion_nodes(captured.program.graph_module)  # ONNX has no word for them
                registry = copy.copy(_torchlib())
                registry.functions = {name: list(found) for name, found in registry.functions.items()}
                onnx_attention.register(registry, captured)
                onnx_linear.register(registry)
                onnx_norm.register(registry)
                onnx_quantize.register(registry)
                onnx_gelu.register(registry)
                onnx_feed_forward.register(registry)  # takes the activations from the registry
                model = _core._exported_program_to_onnx_program(
                    captured.program, registry=registry, lower="at_conversion"
                ).model
                onnx_optimize.optimize(model, fold_norms=options.weights == "fp32")
                _name(model, captured, path.stem)
                _make_plain(model)
                metadata = onnx_weights.store(model, options.weights)
                if options.precision == "int8":
                    given = [{name: value.numpy() for name, value in inputs.items()} for inputs in captured.calibration]
                    ranges = functools.partial(onnx_calibrate.ranges_of, model, inputs=given, folder=path.parent)
                    metadata |= onnx_quantize.quantize(model, ranges if given else None)
                _set_opset(model, self.opset, onnx_attention.domains(options.attention))
        except Exception as error:
            root: BaseException = error
            while root.__cause__ is not None:
                root = root.__cause__
            raise LoweringError(
                f"the graph cannot be converted: {type(root).__name__}: {str(root).partition(chr(10))[0]}",
                subject="onnx",
            ) from error
        onnx_file.write(model, path, external_data=options.external_data)
        return {**metadata, **(write_config(captured, path, "onnxruntime") if options.layout == "triton" else {})}

    def session_settings(self, *, threads: Any = None, providers: Any = None) -> dict[str, Any]:
        """Checked: ``threads`` a whole number, ``providers`` names or (name, options) that this ONNX Runtime has."""
        from sam3x.targets.onnx import device as onnx_device
        from sam3x.targets.onnx import session as onnx_session

        settings: dict[str, Any] = {}
        if threads is not None:
            settings["threads"] = onnx_session.checked_threads(threads)
        if providers is not None:
            settings["providers"] = onnx_session.checked_providers(providers)
            settings["memory"] = onnx_device.memory_of(settings["providers"])
        return settings

    def load_runner(self, path: Path, **settings: Any) -> Runner:
        from sam3x.targets.onnx import session as onnx_session

        providers = settings.get("providers", ())
        options = onnx_session.options_of_openvino(providers) if providers else None
        if options is not None:
            return OpenVinoRunner(path, settings.get("threads"), options)
        return OnnxRunner(path, **settings)

    def fallbacks(self, path: Path, providers: Any) -> tuple[int, Mapping[str, int]]:
        from sam3x.targets.onnx import session as onnx_session

        return onnx_session.fallbacks(path, onnx_session.checked_providers(providers))

    def versions(self) -> dict[str, Any]:
        names = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime")
        return {name: version(name) for name in names}


def _precision_passes(options: OnnxOptions) -> tuple[Pass, ...]:
    """What makes a graph in float32 one in ``options.precision``."""
    if options.precision == "fp32":
        return ()
    import torch

    from sam3x.passes.cleanup.fold_constants import FoldConstantsPass
    from sam3x.passes.precision import autocast
    from sam3x.passes.precision.convert_precision import ConvertPrecisionPass

    if options.precision == "int8":
        from sam3x.passes.precision.keep_float32 import KeepFloat32Pass

        return (KeepFloat32Pass(options.fp32_names, shared=options.fp32_shared), FoldConstantsPass())
    convert = ConvertPrecisionPass(
        torch.float16, options.fp32_names, autocast.stays_in_float32, autocast.follows, shared=options.fp32_shared
    )
    return (convert, FoldConstantsPass())


class OnnxRunner:
    """An ONNX Runtime session, on the CPU unless ``providers`` says otherwise.

    Args:
        memory: of the device that sessions share; None: the host's.
    """

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        providers: Sequence[onnx_session.Provider] = (),
        memory: onnx_device.DeviceMemory | None = None,
    ) -> None:
        from sam3x.targets.onnx import session as onnx_session

        self._memory, self._path, self._threads = memory, path, threads
        self._session = onnx_session.open_session(path, threads, providers)
        self._outputs = [item.name for item in self._session.get_outputs()]

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._memory is not None:
            return dict(zip(self._outputs, self._memory.run(self._session, self._outputs, inputs), strict=True))
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))

    def profile(self, inputs: dict[str, np.ndarray], runs: int = 3) -> list[dict[str, Any]]:
        """Time by operator on the CPU, in a second session beside the open one; see ``sam3x.targets.onnx.profile``."""
        from sam3x.targets.onnx.profile import profile

        return profile(self._path, inputs, runs, self._threads)


def _name(model: ir.Model, captured: CapturedProgram, graph_name: str) -> None:
    """Public names for outputs and dimensions; what the exporter derives from symbols is spelt with the same names."""
    import onnx_ir as ir

    model.graph.name = graph_name
    model.producer_name = "sam3x"
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()  # stack traces and fx nodes: half a megabyte, with paths of the machine that exported
    inputs = {value.name for value in model.graph.inputs}
    for value, name in zip(model.graph.outputs, captured.output_names, strict=True):
        for other in ir.traversal.RecursiveGraphIterator(model.graph):
            for output in other.outputs:
                if output.name == name and output is not value:
                    output.name = f"{name}_inner"
        if value.name not in inputs:
            value.name = name
    symbols = captured.dim_names

    def renamed(value: ir.Value) -> None:
        if value.shape is None:
            return
        for index, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                text = re.sub(r"\bs\d+\b", lambda m: symbols.get(m.group(), m.group()), str(dim.value))
                value.shape[index] = ir.SymbolicDim(text)

    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = value.shape.copy(frozen=False) if hasattr(value.shape, "copy") else ir.Shape(value.shape.dims)
        renamed(value)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for output in node.outputs:
            if output.shape is not None:
                output.shape = ir.Shape(output.shape.dims)
                renamed(output)


def _make_plain(model: ir.Model) -> None:
    """What tools take for granted of sub-graphs, though ONNX does not ask for it; in place.

    - A name stands for one thing in the whole file, not for one in each sub-graph: onnx's shape inference and others keep
      what they know by name alone. So does the name of a sub-graph: ONNX Runtime's transformers optimizer finds graphs by it.
    - Numbers become float by a ``CastLike`` of a constant, whose dtype converters to float16 change; they leave a ``Cast``.
    - A float input that sub-graphs alone read goes through an ``Identity``: converters to float16 put a cast behind inputs, and
      look for readers in the outermost graph.
    """
    import onnx_ir as ir

    def new(name: str | None, taken: set[str]) -> str:
        made, number = str(name), 0
        while made in taken:
            number += 1
            made = f"{name}_{number}"
        taken.add(made)
        return made

    graph = model.graph
    nodes, graphs = {str(node.name) for node in graph}, {str(graph.name)}
    values = {str(value.name) for value in (*graph.inputs, *graph.initializers.values())}
    values |= {str(output.name) for node in graph for output in node.outputs}
    for inner in graph.subgraphs():
        inner.name = new(inner.name, graphs)
        for value in (*inner.inputs, *(output for node in inner for output in node.outputs)):
            value.name = new(value.name, values)
        for node in inner:
            node.name = new(node.name or node.op_type, nodes)
    _cast_like(graph, new("float_like", values))
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT and value.uses() and all(use.node.graph is not graph for use in value.uses()):
            read = ir.node("Identity", [value], name=new(f"{value.name}_identity", nodes))
            made = read.outputs[0]
            made.name, made.dtype, made.shape = new(f"{value.name}_read", values), value.dtype, value.shape
            value.replace_all_uses_with(made)
            read.replace_input_with(0, value)
            graph.insert_before(graph[0], [read])


def _cast_like(graph: ir.Graph, name: str) -> None:
    """``Cast`` to float as ``CastLike`` of one constant of that name, in sub-graphs too."""
    import onnx_ir as ir

    found = [node for node in ir.traversal.RecursiveGraphIterator(graph) if node.op_type == "Cast"]
    found = [node for node in found if node.attributes["to"].as_int() == ir.DataType.FLOAT]
    if not found:
        return
    like = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]), const_value=ir.tensor(0.0, name=name))
    graph.register_initializer(like)
    for cast in found:
        assert cast.graph is not None
        made = ir.node("CastLike", [cast.inputs[0], like], name=cast.name, version=18)
        ir.convenience.replace_nodes_and_values(cast.graph, cast, [cast], [made], cast.outputs, made.outputs)


def _set_opset(model: ir.Model, opset: int, others: Mapping[str, int]) -> None:
    """Drop domains nothing uses; the converter writes opset 18 already. ``others``: domains that may stand beside it."""
    import onnx_ir as ir

    used = {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    for domain in list(model.opset_imports):
        if domain and domain not in used:
            del model.opset_imports[domain]
    expected = {"": opset, **{domain: others[domain] for domain in used & set(others)}}
    if dict(model.opset_imports) != expected:
        raise LoweringError(f"opset imports are {dict(model.opset_imports)}, expected {expected}")
