"""What ``torch.export`` refused, as a ``CaptureError``."""

from __future__ import annotations

from sam3x.errors import CaptureError


def refusal(what: str, error: Exception, fix_sizes: str = "") -> CaptureError:
    """Build the error for ``what``, which ``torch.export`` refused with ``error``.

    Args:
        fix_sizes: the remedy where a size was refused: one that the code fixes, or one that only a run can tell.
    """
    fact = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    words = f"{type(error).__name__}: {fact}".removesuffix(": ")
    return CaptureError(f"torch.export refused {what}: {words}", remedy=fix_sizes if _about_sizes(error) else "")


def _about_sizes(error: BaseException | None) -> bool:
    from torch._dynamo.exc import UserError, UserErrorType
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

    while error is not None:
        if isinstance(error, (ConstraintViolationError, GuardOnDataDependentSymNode)):
            return True
        if isinstance(error, UserError) and error.error_type in (UserErrorType.CONSTRAINT_VIOLATION, UserErrorType.DYNAMIC_DIM):
            return True
        error = error.__cause__ or error.__context__
    return False
