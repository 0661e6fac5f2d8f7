"""Core ML: an ML program in an ``.mlpackage``, converted here by coremltools, run on Apple's systems."""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sam3x.errors import LoweringError, Step, TargetUnavailableError
from sam3x.spec import Branches
from sam3x.targets.base import Target, TargetOptions, TargetStatus, refuse_conditionals
from sam3x.targets.coreml.dtypes import DTYPES, OUTPUT_DTYPES

if TYPE_CHECKING:
    import numpy as np

    from sam3x.capture.program import CapturedProgram
    from sam3x.passes.base import Pass

_INSTALL = 'pip install "sam3x[coreml]"'


class CoreMlOptions(TargetOptions):
    """Options of an export to Core ML.

    Attributes:
        precision: of weights and arithmetic, float32 alone.
    """

    precision: Literal["fp32"] = Field("fp32", description="of weights and arithmetic.")


class CoreMlTarget(Target):
    """``fusion_encoder.mlpackage``, a folder, of which ``Manifest.json`` is the main file."""

    name = "coreml"
    suffix = ".mlpackage"
    options_type = CoreMlOptions
    branches: Branches = "select"
    default_options: ClassVar[dict[str, Any]] = {"batch": (1, 2), "tokens": 5184, "prompt_length": (1, 77)}

    def availability(self) -> TargetStatus:
        missing = [name for name in ("torch", "coremltools") if importlib.util.find_spec(name) is None]
        can = "exports and runs" if _runs() else "exports; Core ML runs on Apple's systems"
        detail = f"missing {', '.join(missing)}" if missing else can
        return TargetStatus(name=self.name, available=not missing, detail=detail, install=_INSTALL)

    def file_name(self, stem: str, options: CoreMlOptions) -> str:
        return f"{stem}{self.suffix}/Manifest.json"

    def legalization_passes(self, options: CoreMlOptions) -> tuple[Pass, ...]:
        from sam3x.passes.attention.decompose_attention import DecomposeAttentionPass
        from sam3x.passes.cleanup.fold_constants import FoldConstantsPass
        from sam3x.passes.cleanup.fold_static_sizes import FoldStaticSizesPass
        from sam3x.passes.decompose.decompose_group_norm import DecomposeGroupNormPass
        from sam3x.passes.decompose.decompose_roi_align import DecomposeRoiAlignPass
        from sam3x.passes.decompose.decompose_slice_scatter import DecomposeSliceScatterPass
        from sam3x.passes.decompose.legalize_for_coreml import LegalizeForCoreMlPass
        from sam3x.passes.decompose.lower_rank import LowerRankPass
        from sam3x.passes.linear.canonicalize_layouts import CanonicalizeLayoutsPass

        return (
            DecomposeRoiAlignPass(),
            DecomposeSliceScatterPass(),
            FoldStaticSizesPass(),
            CanonicalizeLayoutsPass(),
            FoldConstantsPass(),
            DecomposeAttentionPass(),
            DecomposeGroupNormPass(),
            LowerRankPass(),
            LegalizeForCoreMlPass(),
        )

    def lower(self, captured: CapturedProgram, path: Path, options: CoreMlOptions) -> dict[str, Any]:
        """Write the package that ``path`` stands in.

        Raises:
            LoweringError: conditionals that are left, or what coremltools does not convert, in its words.
        """
        from sam3x.targets.coreml.convert import write

        refuse_conditionals(captured.program, "coreml", "coremltools converts none")
        try:
            return write(captured, path.parent)
        except Exception as error:  # coremltools has no exceptions of its own
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            place = traceback.extract_tb(error.__traceback__)[-1].name  # its converters have the names of operators
            fact = (
                f"coremltools cannot convert the graph: {type(error).__name__}{f': {said[-1]}' if said else f' (in {place})'}"
            )
            raise LoweringError(fact, subject="coreml") from error

    def unverifiable(self, options: CoreMlOptions) -> str | None:
        if _runs():
            return None
        return "Core ML runs on Apple's systems. Complete it on a Mac: sam3x verify FOLDER"

    def load_runner(self, path: Path, **settings: Any) -> CoreMlRunner:
        return CoreMlRunner(path.parent)

    def versions(self) -> dict[str, Any]:
        return {name: version(name) for name in ("torch", "coremltools")}


def _runs() -> bool:
    return sys.platform == "darwin"


def _open(package: Path) -> Any:
    import coremltools

    return coremltools.models.MLModel(str(package))


class CoreMlRunner:
    """Core ML through coremltools' binding, which is there on macOS."""

    def __init__(self, package: Path) -> None:
        if not _runs():
            raise TargetUnavailableError("Core ML runs on Apple's systems", remedy="Open it on a Mac.", step=Step.LOAD)
        try:
            self._model = _open(package)
        except ImportError:
            raise TargetUnavailableError(
                "running an .mlpackage needs coremltools", remedy=f"Install it: {_INSTALL}", step=Step.LOAD
            ) from None
        description = self._model.get_spec().description
        self._taken = {item.name: DTYPES[item.type.multiArrayType.dataType] for item in description.input}
        self._given: dict[str, str] = json.loads(description.metadata.userDefined[OUTPUT_DTYPES] or "{}")

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import numpy as np

        # Core ML has neither bool nor rank 0
        given = {name: np.atleast_1d(inputs[name]).astype(dtype) for name, dtype in self._taken.items()}
        found = self._model.predict(given)
        return {str(name): np.asarray(value).astype(self._given.get(name, "float32")) for name, value in found.items()}
