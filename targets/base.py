"""What a back end must offer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import numpy as np

    from sam3x.passes.base import Pass
    from sam3x.program import CapturedProgram


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStatus:
    """Whether a target can be used here, and the command that makes it so."""

    name: str
    available: bool
    detail: str
    install: str


class TargetOptions(BaseModel):
    """Options of one target alone; ``sam3x.export`` hands over every keyword that ``ExportSpec`` does not know.

    A subclass states each as a field with a default. A name that neither knows is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


class Runner(Protocol):
    """Runs an artifact: named arrays in, named arrays out."""

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; inputs are already checked against the manifest."""


class Target(Protocol):
    """A back end: legalize the canonical graph, lower it to files, run them."""

    name: str
    suffix: str
    opset: int | None
    options_type: type[TargetOptions]

    def availability(self) -> TargetStatus:
        """Without importing anything heavy."""

    def legalization_passes(self, options: TargetOptions) -> tuple[Pass, ...]:
        """Passes after the default pipeline."""

    def lower(self, captured: CapturedProgram, path: Path, options: TargetOptions) -> None:
        """Write the artifact at ``path`` (and files beside it).

        Raises:
            LoweringError: the back end refused the graph.
        """

    def load_runner(self, path: Path) -> Runner:
        """Open an artifact without torch where the back end allows."""

    def versions(self) -> dict[str, Any]:
        """Versions of the packages that made the artifact."""
