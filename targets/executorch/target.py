"""ExecuTorch: one ``.pte`` with the graph delegated to XNNPACK, runtime flags as data flow, run by ExecuTorch's own runtime."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from sam3x.errors import ArtifactError, LoweringError, Step, TargetUnavailableError
from sam3x.spec import Branches
from sam3x.targets.base import Numerics, Target, TargetOptions, TargetStatus, refuse_conditionals
from sam3x.targets.quiet import errors_only

if TYPE_CHECKING:
    import numpy as np
    import torch

    from sam3x.capture.program import CapturedProgram
    from sam3x.passes.base import Pass

CONTRACT = "sam3x_contract"
"""A method of the .pte that returns the names of its inputs and outputs, in order, as JSON."""

COND_ISSUE = "https://github.com/pytorch/executorch/issues/21490"
_BACKENDS = {
    "coreml": ("CoreMLBackend", "on a Mac, where the executorch wheel has it"),
    "vulkan": ("VulkanBackend", "where ExecuTorch was built with EXECUTORCH_BUILD_VULKAN=ON"),
}
"""Delegates that not every runtime has: the name the runtime knows it by, and where there is one."""

_INSTALL = 'pip install "sam3x[pte]"'


class PteOptions(TargetOptions):
    """Options of an export to ExecuTorch.

    Attributes:
        delegate: who runs the graph: ``xnnpack`` (any CPU), ``coreml`` (Apple), ``vulkan`` (Android GPUs), or ``none``
            for ExecuTorch's portable kernels.
        precision: ``fp16``: weights and arithmetic, inputs and outputs stay float32. ``int8``: the weights of the
            projections, a scale a row, and their inputs as they come; the rest stays float32.
        bundle: also ``fusion_encoder.bpte``, the same with inputs and the eager encoder's outputs, one case a branch.
    """

    delegate: Literal["xnnpack", "coreml", "vulkan", "none"] = Field("xnnpack", description="what runs the graph.")
    precision: Literal["fp32", "fp16", "int8"] = Field(
        "fp32", description="of weights and arithmetic (int8: of the projections)."
    )
    bundle: bool = Field(False, description="also a file with test inputs and outputs, with which a device checks itself.")

    @model_validator(mode="after")
    def _known_pair(self) -> PteOptions:
        if (self.precision == "int8" and self.delegate != "xnnpack") or (self.precision == "fp16" and self.delegate == "none"):
            able = "xnnpack" if self.precision == "int8" else "xnnpack, coreml, vulkan"
            raise ValueError(f"precision {self.precision} needs another delegate than {self.delegate}: {able}")
        return self


class PteTarget(Target):
    """``fusion_encoder.pte``."""

    name = "pte"
    suffix = ".pte"
    options_type = PteOptions
    branches: Branches = "select"
    default_options: ClassVar[dict[str, Any]] = {"batch": (1, 2), "tokens": 5184, "prompt_length": (1, 77)}

    def availability(self) -> TargetStatus:
        missing = [name for name in ("torch", "executorch") if importlib.util.find_spec(name) is None]
        detail = f"missing {', '.join(missing)}" if missing else "exports and runs"
        return TargetStatus(name=self.name, available=not missing, detail=detail, install=_INSTALL)

    def legalization_passes(self, options: PteOptions) -> tuple[Pass, ...]:
        import torch

        from sam3x.passes.attention.decompose_attention import DecomposeAttentionPass
        from sam3x.passes.attention.legalize_attention_for_pte import LOWEST, LOWEST_HALF, LegalizeAttentionForPtePass
        from sam3x.passes.cleanup.fold_constants import FoldConstantsPass
        from sam3x.passes.decompose.decompose_roi_align import DecomposeRoiAlignPass
        from sam3x.passes.decompose.legalize_norms_for_pte import LegalizeNormsForPtePass
        from sam3x.passes.linear.canonicalize_layouts import CanonicalizeLayoutsPass
        from sam3x.passes.precision import autocast
        from sam3x.passes.precision.clamp_input_masks import ClampInputMasksPass
        from sam3x.passes.precision.convert_precision import ConvertPrecisionPass

        half = options.precision == "fp16"
        convert = ConvertPrecisionPass(torch.float16, stays=autocast.boxes, follows=lambda _: False, inputs=True)
        by_head = [
            LegalizeAttentionForPtePass(LOWEST_HALF if half else LOWEST),
            DecomposeAttentionPass(),
            LegalizeNormsForPtePass(),
            CanonicalizeLayoutsPass(),
        ]
        return (
            DecomposeRoiAlignPass(),
            CanonicalizeLayoutsPass(),
            FoldConstantsPass(),
            *([ClampInputMasksPass(torch.float16)] if half else []),
            # Core ML has norms, and runs heads side by side
            *([DecomposeAttentionPass()] if options.delegate == "coreml" else by_head),
            *([convert, FoldConstantsPass()] if half and options.delegate == "xnnpack" else []),
        )

    def lower(self, captured: CapturedProgram, path: Path, options: PteOptions) -> dict[str, Any]:
        """Write ``path``; returns what ``pte_metadata.metadata_of`` counts."""
        from sam3x.targets.executorch.lower import write

        release = version("executorch")
        if not conditionals_are_sound(release):
            wrong = f"ExecuTorch {release} gives silently wrong numbers where several share memory ({COND_ISSUE})"
            refuse_conditionals(captured.program, "pte", f"{wrong}, and XNNPACK takes nothing inside them")
        try:
            legal = captured
            if options.precision == "int8":
                from sam3x.targets.executorch.quantize import quantize

                legal = quantize(captured)
            metadata = write(legal, path, options.delegate, options.precision, CONTRACT)
            if options.bundle:
                from sam3x.targets.executorch.bundle import bundle

                metadata["bundled_cases"] = bundle(captured, path)
            return metadata
        except Exception as error:
            root: BaseException = error
            while root.__cause__ is not None:
                root = root.__cause__
            raise LoweringError(
                f"the graph cannot be lowered: {type(root).__name__}: {str(root).partition(chr(10))[0]}",
                subject="pte",
            ) from error

    def unverifiable(self, options: PteOptions) -> str | None:
        backend, place = _BACKENDS.get(options.delegate, ("", ""))
        if not backend:
            return None
        from executorch.runtime import Runtime

        if Runtime.get().backend_registry.is_available(backend):
            return None
        return (
            f"the ExecuTorch runtime installed here has no {backend}. Run sam3x verify {place}, "
            "or export with --bundle and let the device check itself (docs/executorch.md)"
        )

    def numerics(self, options: PteOptions) -> Numerics:
        numerics = super().numerics(options)
        if numerics.arithmetic != "fp16" or self.unverifiable(options) is not None:
            return numerics
        from sam3x.targets.executorch.sums import half_sums

        return replace(numerics, half_sums=half_sums(options.delegate))

    def load_runner(self, path: Path, **settings: Any) -> PteRunner:
        return PteRunner(path)

    def versions(self) -> dict[str, Any]:
        return {name: version(name) for name in ("torch", "executorch")}


def conditionals_are_sound(executorch: str) -> bool:
    """Whether that release runs several ``torch.cond`` right. None does; the fix is proposed in pytorch/executorch#21494."""
    return False


class PteRunner:
    """ExecuTorch's runtime, through its Python binding."""

    def __init__(self, path: Path) -> None:
        try:
            with errors_only("torch.utils._pytree"):  # torchao, which it imports, registers what torch knows by now
                from executorch.runtime import Runtime
        except ImportError:
            raise TargetUnavailableError(
                "running a .pte needs executorch", remedy=f"Install it: {_INSTALL}", step=Step.LOAD
            ) from None
        try:
            program = Runtime.get().load_program(str(path))
            names = json.loads(program.load_method(CONTRACT).execute([])[0])  # type: ignore[union-attr]
            method = program.load_method("forward")
        except (RuntimeError, ValueError, KeyError) as error:
            raise ArtifactError(f"ExecuTorch cannot load {path}: {error}", remedy="Export again.") from error
        self._path, self._method, self._inputs, self._outputs = path, method, names["inputs"], names["outputs"]

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = self._method.execute(self._tensors(inputs))
        return {name: value.numpy() for name, value in zip(self._outputs, results, strict=True)}

    def profile(self, inputs: dict[str, np.ndarray], runs: int = 3) -> list[dict[str, Any]]:
        """Time by operator (``pte_profile.profile``), in a second program beside the loaded one."""
        from sam3x.targets.executorch.profile import profile

        return profile(self._path, self._tensors(inputs), runs)

    def _tensors(self, inputs: dict[str, np.ndarray]) -> list[torch.Tensor]:
        import numpy as np
        import torch

        tensors = [torch.from_numpy(np.asarray(inputs[name], order="C")) for name in self._inputs]
        return [item if item.numel() else item.new_empty(item.shape) for item in tensors]  # numpy's strides are 0 there
