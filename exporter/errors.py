"""The typed errors of sam3x.

Every message carries four things, in this order: the step, the subject, the fact, the next step.
``Sam3xError.exit_code`` is what the command line returns: 2 for input the user can mend.
"""

from __future__ import annotations


class Sam3xError(Exception):
    """Base of every error that sam3x raises on purpose."""

    exit_code = 2


class SpecError(Sam3xError):
    """The request contradicts itself or the module (ranges upside down, dac over an odd batch, ...)."""


class SourceError(Sam3xError):
    """A checkpoint, factory or module cannot be read as a fusion encoder."""


class CaptureError(Sam3xError):
    """``torch.export`` could not capture the module, or specialized a dimension that must stay dynamic."""


class PassError(Sam3xError):
    """A graph pass failed; subclasses say whether before it, after it, or in the numbers."""


class PreconditionError(PassError):
    """A pass was handed a graph it declares it cannot work on, or in the wrong order."""


class PostconditionError(PassError):
    """A pass left a graph that breaks its own promise or torch's invariants."""


class VerificationError(Sam3xError):
    """Outputs are further from the eager module than the tolerance allows."""


class TargetError(Sam3xError):
    """A back end cannot be found, used, or fed."""


class UnknownTargetError(TargetError):
    """No target of that name is registered."""


class TargetUnavailableError(TargetError):
    """The target exists, the packages it needs do not."""


class LoweringError(TargetError):
    """The back end refused the canonical graph."""


class BuilderError(LoweringError):
    """The back end took the graph, and its own compiler crashed on it or broke an assertion of its own."""


class ArtifactError(Sam3xError):
    """An exported folder is missing, damaged, edited after export, or fed wrong inputs."""
