"""What verification finds and what it speaks of: tensors by name, and one record an output. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import numpy as np


class Runner(Protocol):
    """Runs an artifact: named arrays in, named arrays out."""

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once; inputs are already checked against the manifest."""


class Record(BaseModel):
    """A frozen part of a manifest."""

    model_config = ConfigDict(frozen=True)


class TensorSpec(Record):
    """A graph input or output: numpy dtype name; a dimension is an int or a name (``batch``)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class VerificationRecord(Record):
    """One branch at one size, one output.

    ``max_abs`` and ``max_rel`` compare the artifact with eager float32. ``from_float64`` and ``eager_from_float64`` are both
    runs' distances from eager float64, None where float32 decided a large comparison. Passed when ``max_abs`` ≤ ``allowed``,
    or the artifact is within 4 times eager's own.
    ``float32_alone`` says why there is no float64 to compare with; ``allowed`` is then 4 times what the last bits of the inputs
    move eager, where that is more.
    Below float32 ``rms_rel`` is the root mean square of the difference from eager float32 over that of the output, and
    ``eager_rms_rel`` the same for eager rounded to the artifact's precision; passed by those and ``allowed`` (decision 0010).
    Where weights alone are rounded, eager float32 has those weights too, and ``from_unrounded`` is the largest difference from
    eager as it was; ``rms_rel`` and ``eager_rms_rel`` are from that one, and decide nothing (decision 0015).
    ``undefined`` elements are NaN in eager itself, which only an all-padded prompt may cause; they are not compared.
    ``undefined_in_artifact`` are NaN in the artifact where eager has a number; ``first_undefined`` is the place of the first of
    either.
    """

    branch: str
    case: str
    output: str
    max_abs: float
    max_rel: float
    from_float64: float | None = None
    eager_from_float64: float | None = None
    float32_alone: str | None = None
    allowed: float
    rms_rel: float | None = None
    eager_rms_rel: float | None = None
    from_unrounded: float | None = None
    passed: bool
    undefined: int = 0
    undefined_in_artifact: int = 0
    first_undefined: tuple[int, ...] | None = None
