"""What a back end must offer."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator

from sam3x.errors import LoweringError, SpecError, Step
from sam3x.spec import Branches
from sam3x.verify.record import Runner

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from typing_extensions import Self

    from sam3x.capture.program import CapturedProgram
    from sam3x.passes.base import Pass


_MEASURED = "auto"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStatus:
    """Whether a target can be used here, and the command that makes it so."""

    name: str
    available: bool
    detail: str
    install: str


def refuse_conditionals(program: ExportedProgram, subject: str, why: str) -> None:
    """Refuse a program in which ``torch.cond`` is left.

    Args:
        subject: the target. why: what becomes of conditionals there.

    Raises:
        LoweringError: names them; the remedy tells conditionals that were asked for from a size that no pass could do without.
    """
    from sam3x.passes.graph.cond_graph import cond_places, gives_a_size_alone

    left = list(cond_places(program))
    if not left:
        return
    names = ", ".join(name for name, _, _ in left[:3])
    if all(gives_a_size_alone(node) for _, _, node in left):
        raise LoweringError(
            f"a size that dac decides is left as a conditional ({names}): something in the module's own attention works over "
            f"all of the halved dimension; {why}",
            subject=subject,
            remedy="Fix the flag (--dac off), or halve the batch (--dac-dim 0).",
        )
    raise LoweringError(
        f"{len(left)} conditionals are left ({names}): {why}",
        subject=subject,
        remedy="Make the flags data flow (--branches select), or fix them (--dac off --pre-norm on).",
    )


class TargetOptions(BaseModel):
    """Options of one target alone; ``sam3x.export`` hands over every keyword that a request does not know.

    A subclass states each as a field with a default and a description, which is the help of its option of ``sam3x export``
    (``cli_target_options``). A name that neither knows is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def of_component(self, name: str) -> Self:
        """The options of one component where several are exported."""
        return self


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


class Float32Operations(TargetOptions):
    """Operations that stay in float32 where the precision is lower, separated by commas.

    A kind (``layer_norm``), a place (``layers.3.linear2``), or a pattern with ``*``; ``sam3x doctor`` names them. Of a whole
    model, ``decoder:layer_norm`` is of one component, and a name alone of every component that has it. ``auto`` measures
    them, as ``sam3x doctor`` does, and ``auto:0.05`` for an error of one's own.
    """

    fp32_ops: str = Field(
        "",
        description="operations that stay in float32: kinds, places, patterns; decoder:layer_norm is of one component; "
        "auto or auto:0.05 measures which must, as sam3x doctor does, for its bound or that one.",
        json_schema_extra={"metavar": "A,B,C"},
    )
    _shared: bool = PrivateAttr(False)

    @field_validator("fp32_ops")
    @classmethod
    def _bounded(cls, value: str) -> str:
        word, colon, bound = value.partition(":")
        if word.strip() == _MEASURED and colon:
            try:
                able = 0 < float(bound) < math.inf
            except ValueError:
                able = False
            if not able:
                raise ValueError(f"'{bound}' is no error that can be held; give a number above 0, as auto:0.05")
        return value

    @property
    def fp32_measured(self) -> bool:
        """Tell whether ``fp32_ops`` is ``auto``: the export is to find the operations by the error that each makes."""
        return self.fp32_ops.partition(":")[0].strip() == _MEASURED

    @property
    def fp32_bound(self) -> float | None:
        """The error that ``auto`` is to hold; None: the doctor's own for the precision."""
        bound = self.fp32_ops.partition(":")[2] if self.fp32_measured else ""
        return float(bound) if bound else None

    @property
    def fp32_names(self) -> tuple[str, ...]:
        """``fp32_ops`` one by one; none where they are to be measured."""
        if self.fp32_measured:
            return ()
        return tuple(name.strip() for name in self.fp32_ops.split(",") if name.strip())

    @property
    def fp32_shared(self) -> bool:
        """Whether other components are given the names too, so that one need not have each."""
        return self._shared

    def of_component(self, name: str) -> Self:
        """``fp32_ops`` without those of other components."""
        own = [word.removeprefix(f"{name}:") for word in self.fp32_names if ":" not in word or word.startswith(f"{name}:")]
        return self.with_names([self.fp32_ops] if self.fp32_measured else own)

    def with_names(self, names: Sequence[str]) -> Self:
        """``fp32_ops`` of these names, of which a graph need not have each."""
        options = self.model_copy(update={"fp32_ops": ",".join(names)})
        options._shared = True
        return options

    def refuse_idle(self, idle: Sequence[str], remedy: str) -> None:
        """Refuse operations in float32 where everything is.

        Args:
            idle: precisions that have no others.

        Raises:
            SpecError: operations are named, and the precision is one of ``idle``.
        """
        if (self.fp32_names or self.fp32_measured) and getattr(self, "precision", "fp32") in idle:
            raise SpecError("everything is float32 already", subject="--fp32-ops", remedy=remedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """What an artifact stores and computes below float32.

    Attributes:
        weights: ``fp16`` or ``int8`` where the file holds weights of that precision and everything else is float32. The
            exporter then rounds the weights before it captures, and the artifact must equal eager with those weights as
            closely as float32 must.
        arithmetic: what the artifact computes in (``fp16``, ``bf16``, ``tf32``, ``int8``); None: float32.
        half_sums: whether its kernels keep the sums of products in float16 on this machine.
        row_scales: of ``int8``: whether each row of activations has a scale of its own, or the whole tensor has one.
        int8_convolutions: whether convolutions are in ``int8`` as linears are, what comes out of them too.
    """

    weights: str | None = None
    arithmetic: str | None = None
    half_sums: bool = False
    row_scales: bool = True
    int8_convolutions: bool = False

    @property
    def below(self) -> str | None:
        """What is not float32: the precision of the weights, or of the arithmetic."""
        return self.weights or self.arithmetic


class Target(ABC):
    """A back end: legalize the canonical graph, lower it to files, run them.

    Attributes:
        name: what ``--target`` takes. suffix: of the artifact's main file. opset: of ONNX-like formats.
        options_type: this target's own options.
        branches: the form of runtime flags it runs best.
        default_options: fields of the request (``ExportSpec``) whose defaults differ for it.
    """

    name: str
    suffix: str
    opset: int | None = None
    options_type: type[TargetOptions] = TargetOptions
    branches: Branches = "cond"
    default_options: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def availability(self) -> TargetStatus:
        """Without importing anything heavy."""

    def check(self, ranges: Mapping[str, tuple[int, int]], options: Any) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuse what can be refused before anything heavy is imported.

        Args:
            ranges: inclusive sizes of ``batch``, ``tokens`` and ``prompt_length``.

        Raises:
            SpecError: options that contradict each other, the ranges or this machine.
        """

    def file_name(self, stem: str, options: Any) -> str:
        """Where the artifact's main file stands in the output folder; a nested path works."""
        return f"{stem}{self.suffix}"

    def branches_of(self, options: Any) -> Branches:
        """The form of runtime flags where the request names none."""
        return self.branches

    def numerics(self, options: Any) -> Numerics:
        """What an artifact with these options stores and computes in: arithmetic in its ``precision``, if it has one."""
        precision = str(getattr(options, "precision", "fp32"))
        return Numerics(arithmetic=None if precision == "fp32" else precision)

    def legalization_passes(self, options: Any) -> tuple[Pass, ...]:
        """Passes after the default pipeline."""
        return ()

    def prove(self, captured: CapturedProgram, options: Any) -> dict[str, Any]:
        """Check what can be checked of the graph before it is lowered; returned metadata goes to the manifest.

        Not asked where verification is switched off.

        Raises:
            VerificationError: the graph is off in some branch.
        """
        return {}

    @abstractmethod
    def lower(self, captured: CapturedProgram, path: Path, options: Any) -> dict[str, Any] | None:
        """Write the artifact at ``path`` (and files beside it); returned metadata goes to the manifest.

        ``metadata["notes"]``, a list of sentences, goes to its notes: what the user should be told of how it was written.

        Raises:
            LoweringError: the back end refused the graph.
        """

    def unverifiable(self, options: Any) -> str | None:
        """Why an artifact with these options cannot be run on this machine; None where it can, and so is verified."""
        return None

    @abstractmethod
    def load_runner(self, path: Path, **settings: Any) -> Runner:
        """Open an artifact without torch where the back end allows.

        Args:
            settings: what ``session_settings`` gave.
        """

    def session_settings(self, *, threads: Any = None, providers: Any = None) -> dict[str, Any]:
        """Keywords of ``load_runner`` for settings of a runtime, those that are not None, checked.

        Raises:
            SpecError: the target has no such setting. TargetUnavailableError: what a setting names is not installed.
        """
        wanted = [name for name, value in (("threads", threads), ("providers", providers)) if value is not None]
        if wanted:
            fact = f"{' and '.join(wanted)} are settings of ONNX Runtime, and the target is {self.name}"
            raise SpecError(fact, step=Step.LOAD)
        return {}

    def fallbacks(self, path: Path, providers: Any) -> tuple[int, Mapping[str, int]]:
        """How many nodes a file has, and those, by operator, that a provider of its runtime leaves to another.

        Raises:
            SpecError: the target has no providers. TargetUnavailableError: one that is not installed.
        """
        self.session_settings(providers=providers)
        return 0, {}

    def versions(self) -> dict[str, Any]:
        """Versions of the packages that made the artifact."""
        return {}
