"""What a back end must offer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sam3x.errors import SpecError, Step, did_you_mean
from sam3x.spec import Branches, ExportSpec, checked, make_spec
from sam3x.verify.record import Runner

if TYPE_CHECKING:
    from sam3x.capture.program import CapturedProgram
    from sam3x.passes.base import Pass


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStatus:
    """Whether a target can be used here, and the command that makes it so."""

    name: str
    available: bool
    detail: str
    install: str


class TargetOptions(BaseModel):
    """Options of one target alone; ``sam3x.export`` hands over every keyword that ``ExportSpec`` does not know.

    A subclass states each as a field with a default and a description, which is the help of its option of ``sam3x export``
    (``cli_target_options``). A name that neither knows is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


class AttentionMemory(TargetOptions):
    """What the scores of one attention may take: a whole number and a unit, as in ``256MB``."""

    attention_memory: str = Field(
        "256MB",
        description="what the scores of one attention may take.",
        json_schema_extra={"metavar": "SIZE"},
    )

    @field_validator("attention_memory", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        found = re.fullmatch(r"([0-9]+)\s*([KMG]i?B|B)", value) if isinstance(value, str) else None
        if found is None or not 0 < int(found[1]) * _UNITS[found[2]] < 2**62:
            raise ValueError(f"expected a whole number above 0 and a unit ({', '.join(_UNITS)}), as in 256MB, got {value!r}")
        return f"{int(found[1])}{found[2]}"

    @property
    def attention_bytes(self) -> int:
        """``attention_memory`` in bytes."""
        number, unit = re.fullmatch(r"([0-9]+)(.*)", self.attention_memory).groups()  # type: ignore[union-attr]
        return int(number) * _UNITS[unit]


def resolve(target: Target, options: Mapping[str, Any]) -> tuple[ExportSpec, TargetOptions]:
    """The request and the target's own options out of ``sam3x.export``'s keywords, the target's defaults filled in.

    Raises:
        SpecError: a value is wrong, or a name is known to neither, with the nearest that is.
    """
    own = target.options_type.model_fields
    unknown = [name for name in options if name not in own and name not in ExportSpec.model_fields]
    if unknown:
        near = did_you_mean(unknown[0], [*ExportSpec.model_fields, *own])
        known = f"Options of {target.name} alone: {', '.join(sorted(own)) or 'none'}. See sam3x export --help."
        raise SpecError(
            f"no option of an export to {target.name}", subject=", ".join(unknown), remedy=f"{near} {known}".lstrip()
        )
    defaults = dict(target.default_options)
    if options.get("interface") == "feature_maps":
        defaults.pop("tokens", None)  # the maps' sizes say how many
    given = {**defaults, **{name: value for name, value in options.items() if name not in own}}
    if given.get("branches") is None:
        given["branches"] = target.branches
    spec = make_spec(**given)
    own_options = checked(target.options_type, {name: value for name, value in options.items() if name in own})
    check = getattr(target, "check", None)
    if check is not None:
        check(spec, own_options)
    return spec, own_options


def file_name(target: Target, stem: str, options: TargetOptions) -> str:
    """Name of the artifact's main file: ``stem`` and the suffix, or what the target's own ``file_name(stem, options)`` says."""
    own = getattr(target, "file_name", None)
    return f"{stem}{target.suffix}" if own is None else own(stem, options)


def weight_precision(target: Target, options: TargetOptions) -> str | None:
    """``fp16`` or ``int8`` where the file holds weights of that precision and everything else is float32; None anywhere else.

    The exporter then rounds the weights before it captures, and the artifact must equal eager with those weights as closely as
    float32 must: what the target's own ``weight_precision(options)`` says, if it has one.
    """
    own = getattr(target, "weight_precision", None)
    return None if own is None else own(options)


def arithmetic_precision(target: Target, options: TargetOptions) -> str | None:
    """What below float32 the artifact computes in; None where it is float32, though weights may be rounded."""
    precision = str(getattr(options, "precision", "fp32"))
    return None if precision == "fp32" or weight_precision(target, options) is not None else precision


def half_sums(target: Target, options: TargetOptions) -> bool:
    """Whether the target's kernels keep sums in float16 on this machine: what its own ``half_sums(options)`` says, if any."""
    own = getattr(target, "half_sums", None)
    return False if own is None else own(options)


def session_settings(target: Target, **given: Any) -> dict[str, Any]:
    """Keywords of ``load_runner`` for the settings that are not None: what the target's own ``session_settings`` makes of them.

    Raises:
        SpecError: the target has no such setting. TargetUnavailableError: what a setting names is not installed.
    """
    wanted = {name: value for name, value in given.items() if value is not None}
    own = getattr(target, "session_settings", None)
    if not wanted:
        return {}
    if own is None:
        raise SpecError(f"{' and '.join(wanted)} are settings of ONNX Runtime, and the target is {target.name}", step=Step.LOAD)
    return own(**wanted)


class Target(Protocol):
    """A back end: legalize the canonical graph, lower it to files, run them.

    ``branches`` is the form of runtime flags it runs best; ``default_options`` are ``ExportSpec`` fields that differ for it.
    """

    name: str
    suffix: str
    opset: int | None
    options_type: type[TargetOptions]
    branches: Branches
    default_options: Mapping[str, Any]

    def availability(self) -> TargetStatus:
        """Without importing anything heavy."""

    def legalization_passes(self, options: TargetOptions) -> tuple[Pass, ...]:
        """Passes after the default pipeline."""

    def lower(self, captured: CapturedProgram, path: Path, options: TargetOptions) -> dict[str, Any] | None:
        """Write the artifact at ``path`` (and files beside it); returned metadata goes to the manifest.

        ``metadata["notes"]``, a list of sentences, goes to its notes: what the user should be told of how it was written.

        Raises:
            LoweringError: the back end refused the graph.
        """

    def unverifiable(self, options: TargetOptions) -> str | None:
        """Why an artifact with these options cannot be run on this machine; None where it can, and so is verified."""

    def load_runner(self, path: Path, **settings: Any) -> Runner:
        """Open an artifact without torch where the back end allows. ``settings``: what its own ``session_settings`` gave."""

    def versions(self) -> dict[str, Any]:
        """Versions of the packages that made the artifact."""
