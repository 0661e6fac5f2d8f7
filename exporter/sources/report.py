"""The report of a checkpoint or a folder: what it is, what can be exported of it, what stands in the way."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from sam3x.errors import SourceError
from sam3x.sources.checkpoint import some_of

_COMPLETE = "Give a complete, undamaged checkpoint."


class LintReport(BaseModel):
    """What ``sam3x lint`` found.

    Attributes:
        kind: ``SAM3``, ``SAM 3.1``, ``EfficientSAM3``, ``transformers``, ``fusion encoder`` or ``unknown``.
        parameters: numbers of the model's part. dtypes: of all its tensors.
        metadata: trunk, text encoder, context length, sizes, in words.
        notes: what was chosen, renamed, merged, converted, rebuilt or left out, a phrase each.
        missing, unexpected, misshaped, mistyped, not_finite: names of weights, against the model that the shapes describe.
        traps: what else stands in the way, a sentence each.
        exports: what can be exported of it: ``image model``, its ``interactive head``, ``fusion encoder``.
        remedy: what to do where something stands in the way.
    """

    model_config = ConfigDict(frozen=True)

    path: str
    kind: str
    parameters: int
    dtypes: tuple[str, ...]
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[str, ...] = ()
    mistyped: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()
    traps: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    remedy: str = _COMPLETE

    @property
    def faults(self) -> tuple[str, ...]:
        """What keeps it from being exported whole, a phrase each."""
        named = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "mis-shaped": self.misshaped,
            "of another type": self.mistyped,
            "not finite": self.not_finite,
        }
        return (*(f"{kind}: {some_of(names)}" for kind, names in named.items() if names), *self.traps)

    @property
    def clean(self) -> bool:
        """Whether nothing stands in the way of an export."""
        return not self.faults and bool(self.exports)

    def refuse(self) -> None:
        """Raise for what stands in the way of exporting the image model.

        Raises:
            SourceError: naming all of it.
        """
        if not {"image model", "interactive head"}.intersection(self.exports):
            what = "; ".join(self.faults) or f"it holds {'a fusion encoder alone' if self.exports else 'nothing known'}"
            raise SourceError(f"{self.path} cannot be exported as an image model. {what}", remedy=self.remedy)
