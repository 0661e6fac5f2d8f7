"""TensorRT: one engine of the whole graph through Torch-TensorRT, ahead of time for a named GPU, or ONNX for ``trtexec``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sam3x.errors import SpecError, TargetUnavailableError
from sam3x.spec import Branches
from sam3x.targets.base import Target, TargetOptions, TargetStatus
from sam3x.targets.tensorrt.options import TrtOptions, capability_of, optima
from sam3x.targets.triton import model_path, write_config

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

    from sam3x.capture.program import CapturedProgram
    from sam3x.passes.base import Pass
    from sam3x.targets.base import Runner

DISTRIBUTIONS = {"torch-tensorrt-rtx": "TensorRT-RTX", "torch-tensorrt": "TensorRT"}
"""Both install ``torch_tensorrt``; what each builds with."""

SMALL_HIDDEN = 32 << 20
"""Bytes of a feed-forward block's hidden layer, of a known size, that need no tiles."""
_INSTALL = 'pip install "sam3x[trt-rtx]", or "sam3x[trt]" for TensorRT itself'
_NOT_IN_TRITON = (
    "an engine of TensorRT-RTX, and Triton's tensorrt backend loads those of TensorRT: export with sam3x[trt] on the GPU, or "
    "--format plan-onnx for Triton's onnxruntime backend"
)
_SUFFIX = {"engine": ".engine", "ep": ".pt2", "plan-onnx": ".onnx"}


class TrtTarget(Target):
    """``fusion_encoder.engine``, ``.pt2`` or ``.onnx``."""

    name = "trt"
    suffix = ".engine"
    options_type: type[TargetOptions] = TrtOptions
    branches: Branches = "select"
    default_options: ClassVar[dict[str, Any]] = {"batch": (1, 4), "tokens": 5184, "prompt_length": (1, 77)}

    def availability(self) -> TargetStatus:
        from sam3x.targets.tensorrt.driver import gpu_count

        name = distribution()
        if importlib.util.find_spec("torch") is None or name is None:
            missing = "torch" if importlib.util.find_spec("torch") is None else "torch_tensorrt"
            return TargetStatus(name=self.name, available=False, detail=f"missing {missing}", install=_INSTALL)
        ahead = DISTRIBUTIONS[name] == "TensorRT-RTX"
        runs = gpu_count() > 0
        can = (
            "builds and runs"
            if runs
            else "builds for a named GPU; running needs one"
            if ahead
            else "neither builds nor runs: no GPU"
        )
        detail = f"{name} {version(name)} ({DISTRIBUTIONS[name]}): {can}"
        return TargetStatus(name=self.name, available=runs or ahead, detail=detail, install=_INSTALL)

    def check(self, ranges: Mapping[str, tuple[int, int]], options: TrtOptions) -> None:
        """Refuse what can be refused before anything heavy is imported.

        Raises:
            SpecError: a profile outside its range, no GPU and none named, ``fp32_ops`` where all is float32, ``bf16`` on a GPU
                without it.
            TargetUnavailableError: TensorRT itself, which builds on the GPU only.
        """
        from sam3x.targets.tensorrt.driver import gpu_count

        optima(ranges, options)
        options.refuse_idle(("fp32", "tf32"), "Choose --precision fp16 or bf16.")
        if options.precision == "bf16" and capability_of(options.compute_capability or "sm80") < (8, 0):
            raise SpecError(
                f"{options.compute_capability} (Turing) computes in no bfloat16",
                subject="--precision bf16",
                remedy="Choose --precision fp16, or a GPU from sm80 on.",
            )
        if options.layout == "triton" and options.format == "ep":
            raise SpecError("Triton serves an engine or ONNX", subject="--layout triton", remedy="Choose another --format.")
        if gpu_count() == 0 and distribution() is not None:
            if options.format == "ep":
                raise SpecError(
                    "--format ep loads the engine while it is exported, and there is no GPU here",
                    remedy="Export it on the GPU machine, or choose --format engine.",
                )
            if options.compute_capability is None:
                raise SpecError(
                    "there is no GPU here",
                    remedy=(
                        "Name the one the engine is for: --compute-capability sm89 (RTX 40; sm80 A100, sm86 RTX 30, sm120 "
                        "RTX 50)."
                    ),
                )
            if DISTRIBUTIONS[str(distribution())] != "TensorRT-RTX":
                raise TargetUnavailableError(
                    "TensorRT builds for the GPU it runs on, and there is none here",
                    remedy='Build ahead of time with TensorRT-RTX: pip install "sam3x[trt-rtx]"',
                )

    def file_name(self, stem: str, options: TrtOptions) -> str:
        if options.layout == "triton":
            return model_path(stem, ".onnx" if options.format == "plan-onnx" else ".plan")
        return f"{stem}{_SUFFIX[options.format]}"

    def legalization_passes(self, options: TrtOptions) -> tuple[Pass, ...]:
        from sam3x.passes.attention.decompose_attention import DecomposeAttentionPass
        from sam3x.passes.attention.legalize_attention_for_trt import LegalizeAttentionForTrtPass
        from sam3x.passes.attention.simplify_attention_masks import SimplifyAttentionMasksPass
        from sam3x.passes.branches.if_convert import IfConvertPass
        from sam3x.passes.cleanup.fold_constants import FoldConstantsPass
        from sam3x.passes.cleanup.fold_static_sizes import FoldStaticSizesPass
        from sam3x.passes.decompose.decompose_roi_align import DecomposeRoiAlignPass
        from sam3x.passes.decompose.decompose_slice_scatter import DecomposeSliceScatterPass
        from sam3x.passes.decompose.expand_repeats import ExpandRepeatsPass
        from sam3x.passes.linear.tile_feed_forward import TileFeedForwardPass

        lower = (
            IfConvertPass(rows_only=True),
            FoldStaticSizesPass(),
            ExpandRepeatsPass(),
            SimplifyAttentionMasksPass(),
            *precision_passes(options),
            DecomposeSliceScatterPass(),
            DecomposeRoiAlignPass(),  # after what would round the places of its samples
        )
        if options.format == "plan-onnx":
            from sam3x.targets.tensorrt.onnx import onnx_passes

            return (*lower, *onnx_passes())
        return (
            *lower,
            TileFeedForwardPass(SMALL_HIDDEN),
            FoldConstantsPass(),
            LegalizeAttentionForTrtPass(options.attention_bytes, explicit=options.attention == "explicit"),
            DecomposeAttentionPass(float32_softmax=options.attention == "explicit"),
        )

    def prove(self, captured: CapturedProgram, options: TrtOptions) -> dict[str, Any]:
        """Run the legalized graph in torch: it may be all that can be run of an engine on this machine."""
        from sam3x.targets.tensorrt.check import drift

        found = drift(captured, options.precision)
        return {
            "drift": {case: ", ".join(f"{name} {value:.3g}" for name, value in item.items()) for case, item in found.items()}
        }

    def lower(self, captured: CapturedProgram, path: Path, options: TrtOptions) -> dict[str, Any]:
        """Write ``path``.

        Raises:
            LoweringError: what cannot be converted, by name and reason.
        """
        from sam3x.targets.tensorrt import build as trt_build

        name = str(distribution())
        metadata: dict[str, Any] = {"distribution": f"{name} {version(name)}", "format": options.format}
        if options.layout == "triton":
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata |= write_config(captured, path, "onnxruntime" if options.format == "plan-onnx" else "tensorrt")
        from sam3x.targets.tensorrt.driver import this_gpu

        capability = options.compute_capability or this_gpu()
        metadata["compute_capability"] = capability
        if options.format == "plan-onnx":
            from sam3x.targets.tensorrt.onnx import write_plan_onnx

            return {**metadata, **write_plan_onnx(captured, path, options, capability)}
        if options.format == "ep":
            from sam3x.targets.tensorrt.program import write_program

            return {**metadata, **write_program(captured, path, options)}
        built = trt_build.build(captured, options, capability)
        path.write_bytes(built.engine)
        notes = [*built.metadata.get("notes", ())]
        if options.layout == "triton" and DISTRIBUTIONS[name] == "TensorRT-RTX":
            notes.append(_NOT_IN_TRITON)
        return {**metadata, **built.metadata, **({"notes": notes} if notes else {})}

    def unverifiable(self, options: TrtOptions) -> str | None:
        from sam3x.targets.tensorrt.driver import gpu_count, this_gpu

        if options.format == "plan-onnx" or (gpu_count() and options.compute_capability in (None, this_gpu())):
            return None
        where = f"a {options.compute_capability} GPU" if gpu_count() else "a GPU, and there is none here"
        return f"the engine runs on {where}; its graph was run in torch instead. Complete it there: sam3x verify FOLDER"

    def load_runner(self, path: Path, **settings: Any) -> Runner:
        if path.suffix == ".onnx":
            from sam3x.targets.onnx.target import OnnxTarget

            return OnnxTarget().load_runner(path)
        if path.suffix == ".pt2":
            from sam3x.targets.tensorrt.program import ProgramRunner

            return ProgramRunner(path)
        from sam3x.targets.tensorrt.runner import EngineRunner

        return EngineRunner(path)

    def versions(self) -> dict[str, Any]:
        names = ["torch", *(name for name in (distribution(),) if name)]
        return {name: version(name) for name in names}


def precision_passes(options: TrtOptions) -> tuple[Pass, ...]:
    """What makes a graph in float32 one in ``options.precision``."""
    if options.precision in ("fp32", "tf32"):
        return ()
    import torch

    from sam3x.passes.precision.clamp_input_masks import ClampInputMasksPass
    from sam3x.passes.precision.convert_precision import ConvertPrecisionPass

    if options.precision == "fp16":
        return (
            ClampInputMasksPass(torch.float16),
            ConvertPrecisionPass(torch.float16, options.fp32_names, shared=options.fp32_shared),
        )
    convert = ConvertPrecisionPass(
        torch.bfloat16, options.fp32_names, stays=_transposed_convolutions, shared=options.fp32_shared
    )
    return (ClampInputMasksPass(torch.bfloat16), convert)


def _transposed_convolutions(program: ExportedProgram) -> set[Node]:
    """TensorRT-RTX 1.6 has none in bfloat16."""
    from sam3x.passes.base import graph_modules

    nodes = [node for _, module in graph_modules(program) for node in module.graph.nodes]
    return {node for node in nodes if str(node.target) == "aten.convolution.default" and node.args[6]}


def distribution() -> str | None:
    """The installed distribution of ``torch_tensorrt``; None where there is none."""
    for name in DISTRIBUTIONS:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return name if importlib.util.find_spec("torch_tensorrt") is not None else None
    return None
