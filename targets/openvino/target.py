"""OpenVINO IR: ``.xml`` and ``.bin`` of the graph that the ONNX target lowers, run by OpenVINO's own runtime."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from sam3x.errors import LoweringError, SpecError, Step, TargetUnavailableError
from sam3x.spec import Branches
from sam3x.targets.base import Numerics, Target, TargetOptions, TargetStatus
from sam3x.targets.onnx import openvino as runtime
from sam3x.targets.onnx.session import checked_threads
from sam3x.targets.onnx.target import OnnxOptions, OnnxTarget

if TYPE_CHECKING:
    from sam3x.capture.program import CapturedProgram
    from sam3x.passes.base import Pass

_EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "onnx_ir", "openvino")
_INSTALL = 'pip install "sam3x[openvino]"'


class OpenVinoOptions(TargetOptions):
    """Options of an export to OpenVINO.

    Attributes:
        precision: of the arithmetic, float32 alone: an IR does not say what is computed in, its runtime does.
        weights: how ``.bin`` stores weights that are rounded to less (``int8``: a scale an output channel).
    """

    precision: Literal["fp32"] = Field("fp32", description="of the arithmetic; for less, see INFERENCE_PRECISION_HINT.")
    weights: Literal["fp32", "fp16", "int8"] = Field("fp32", description="storage alone; what computes stays float32.")


class OpenVinoTarget(Target):
    """``fusion_encoder.xml``, its weights in ``fusion_encoder.bin``."""

    name = "openvino"
    suffix = ".xml"
    options_type = OpenVinoOptions
    branches: Branches = "select"

    def availability(self) -> TargetStatus:
        missing = [name for name in _EXPORT_PACKAGES if importlib.util.find_spec(name) is None]
        detail = f"missing {', '.join(missing)}" if missing else "exports and runs"
        if missing and "openvino" not in missing:
            detail = f"runs artifacts; to export, {detail}"
        return TargetStatus(name=self.name, available=not missing, detail=detail, install=_INSTALL)

    def legalization_passes(self, options: OpenVinoOptions) -> tuple[Pass, ...]:
        return OnnxTarget().legalization_passes(_onnx_options(options))

    def numerics(self, options: OpenVinoOptions) -> Numerics:
        return OnnxTarget().numerics(_onnx_options(options))

    def lower(self, captured: CapturedProgram, path: Path, options: OpenVinoOptions) -> dict[str, Any]:
        """Write ``path`` and the weights beside it.

        Raises:
            LoweringError: the graph cannot be converted to ONNX, or OpenVINO does not read it.
        """
        import openvino

        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            graph = Path(folder, f"{path.stem}.onnx")
            metadata = OnnxTarget().lower(captured, graph, _onnx_options(options))
            try:
                # what openvino.convert_model does, without the report that it sends over the network
                model = openvino.Core().read_model(graph)
                for item, name in zip(model.outputs, captured.output_names, strict=True):
                    item.tensor.set_names({name})
                openvino.save_model(model, path, compress_to_fp16=False)
            except RuntimeError as error:
                fact = str(error).strip().rpartition("\n")[2]
                raise LoweringError(f"OpenVINO does not take the graph: {fact}", subject="openvino") from error
            del model  # it may still read the weights from ``graph``
        return metadata

    def session_settings(self, *, threads: Any = None, providers: Any = None) -> dict[str, Any]:
        """Checked: ``threads`` a whole number, ``providers`` OpenVINO's name alone or with options, as ``device``."""
        settings: dict[str, Any] = {}
        if threads is not None:
            settings["threads"] = checked_threads(threads)
        if providers is not None:
            settings["options"] = _options_of(providers)
        return settings

    def load_runner(self, path: Path, **settings: Any) -> runtime.OpenVinoRunner:
        _check_installed()
        return runtime.OpenVinoRunner(path, settings.get("threads"), settings.get("options", {}))

    def fallbacks(self, path: Path, providers: Any) -> tuple[int, Mapping[str, int]]:
        options = _options_of(providers)
        _check_installed()
        return runtime.left_out(path, options)

    def versions(self) -> dict[str, Any]:
        return {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnx-ir", "openvino")}


def _onnx_options(options: OpenVinoOptions) -> OnnxOptions:
    """The form of ONNX file that OpenVINO runs best."""
    return OnnxOptions.model_validate({"runtime": "openvino", "weights": options.weights})


def _options_of(providers: Any) -> dict[str, Any]:
    given = list(providers) if isinstance(providers, Sequence) and not isinstance(providers, str) else [providers]
    only = given[0] if len(given) == 1 else None
    name, options = only if isinstance(only, (tuple, list)) and len(only) == 2 else (only, {})
    known = isinstance(name, str) and name.lower().removesuffix("executionprovider") == "openvino"
    if not known or not isinstance(options, Mapping):
        raise SpecError(
            f"an OpenVINO IR is run by OpenVINO alone, got {providers!r}",
            remedy="Choose its device: --provider openvino:device=GPU, or providers=[('openvino', {'device': 'GPU'})].",
            step=Step.LOAD,
        )
    return {str(key): value for key, value in options.items()}


def _check_installed() -> None:
    if not runtime.installed():
        raise TargetUnavailableError(
            "running an OpenVINO IR needs openvino", remedy="Install it: pip install openvino", step=Step.LOAD
        )
