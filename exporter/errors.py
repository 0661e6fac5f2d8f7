"""The typed errors of sam3x.

An error holds four fields: the step, the subject, the fact, the remedy. ``Sam3xError.__str__`` is the one place that puts them
into words. ``Sam3xError.exit_code`` is what the command line returns: 2 for input the user can mend.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum


class Step(str, Enum):
    """Where an error arose: a step of an export, or what else sam3x was doing. The value is how a message begins."""

    SPEC = "step 1/4 spec"
    SOURCE = "step 1/4 source"
    CAPTURE = "step 2/4 capture"
    PASSES = "step 3/4 passes"
    LOWER = "step 4/4 lower"
    VERIFY = "step 4/4 verify"
    WRITE = "step 4/4 write"
    REVERIFY = "verify"
    LOAD = "load"
    RUN = "run"
    INSPECT = "inspect"
    BENCH = "bench"
    DOCTOR = "doctor"
    LINT = "lint"
    COMPATIBILITY = "compatibility"
    WEB = "web"


class Sam3xError(Exception):
    """Base of every error that sam3x raises on purpose.

    Args:
        fact: what is wrong, without a full stop: ``"dac halves the batch, and the batch is fixed at 3"``.
        subject: whom it is about: a file, an option, a layer, a pass. Left out where the fact names it.
        remedy: what to do next, as one or more sentences that follow from the cause. Left out where none does.
        step: where it arose; each class has its own default.
    """

    exit_code = 2
    step: Step | None = None

    def __init__(self, fact: str, *, subject: str = "", remedy: str = "", step: Step | None = None) -> None:
        super().__init__(fact)
        self.fact, self.subject, self.remedy = fact, subject, remedy
        if step is not None:
            self.step = step

    def __str__(self) -> str:
        """``step: subject: fact. remedy``."""
        parts = [self.step.value if self.step is not None else "", self.subject, self.fact]
        words = ": ".join(part for part in parts if part)
        stop = "" if words.endswith((".", "!", "?", "…")) else "."
        return f"{words}{stop} {self.remedy}".rstrip()


class SpecError(Sam3xError):
    """The request contradicts itself or the module (ranges upside down, dac over an odd batch, ...)."""

    step = Step.SPEC


class SourceError(Sam3xError):
    """A checkpoint, factory or module cannot be read as a fusion encoder."""

    step = Step.SOURCE


class CaptureError(Sam3xError):
    """``torch.export`` could not capture the module, or specialized a dimension that must stay dynamic."""

    step = Step.CAPTURE


class PassError(Sam3xError):
    """A graph pass failed; subclasses say whether before it, after it, or in the numbers."""

    step = Step.PASSES


class PreconditionError(PassError):
    """A pass was handed a graph it declares it cannot work on, or in the wrong order."""


class PostconditionError(PassError):
    """A pass left a graph that breaks its own promise or torch's invariants."""


class VerificationError(Sam3xError):
    """Outputs are further from the eager module than the tolerance allows."""

    step = Step.VERIFY


class TargetError(Sam3xError):
    """A back end cannot be found, used, or fed."""


class UnknownTargetError(TargetError):
    """No target of that name is registered."""

    step = Step.SPEC


class TargetUnavailableError(TargetError):
    """The target exists, the packages it needs do not."""

    step = Step.SPEC


class LoweringError(TargetError):
    """The back end refused the canonical graph."""

    step = Step.LOWER


class BuilderError(LoweringError):
    """The back end took the graph, and its own compiler crashed on it or broke an assertion of its own."""


class ArtifactError(Sam3xError):
    """An exported folder is missing, damaged, edited after export, or fed wrong inputs."""

    step = Step.LOAD


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The remedy for a misspelt ``name``: the nearest of those that exist; empty where none is near."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean '{close[0]}'?" if close else ""
