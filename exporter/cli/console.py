"""What every command stands in: errors as one sentence and an exit code, steps as they pass, others' output out of the way."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import typer

from sam3x.errors import Sam3xError
from sam3x.warning_filters import warnings_not_raised

if TYPE_CHECKING:
    from sam3x.cli.views import Steps


@contextlib.contextmanager
def shown_steps(quiet: bool) -> Iterator[Steps]:
    """Show the steps of an export as they begin and end, on stderr; nothing where ``quiet``."""
    from sam3x.cli.views import Steps

    with Steps(quiet=quiet) as steps:
        yield steps


@contextlib.contextmanager
def suppressed_output(verbose: bool) -> Iterator[None]:
    """What others print goes to stderr, away from --json; torch's own warnings are shown with -v only."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(), contextlib.ExitStack() as stack:
        if not verbose:
            import torch  # noqa: F401 - its import sets the levels of its loggers

            from sam3x.targets.quiet import errors_only

            warnings.simplefilter("ignore")
            stack.enter_context(errors_only("torch.onnx", "torch.export", "torch.utils._pytree"))
        yield


@contextlib.contextmanager
def reporting(verbose: bool) -> Iterator[None]:
    """One message on stderr and an exit code: 2 for what the user can mend, 1 for a bug, 130 for Ctrl-C."""
    try:
        with warnings_not_raised():
            yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        _fail("interrupted.", 130, verbose=False)
    except Sam3xError as error:
        _fail(str(error), error.exit_code, verbose)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "sam3x":
            _unexpected(error, verbose)
        extra = "sam3" if package == "sam3" else "onnx"
        _fail(f"package '{package}' is not installed. Install it: pip install \"sam3x[{extra}]\"", 2, verbose)
    except Exception as error:
        _unexpected(error, verbose)


def _unexpected(error: Exception, verbose: bool) -> NoReturn:
    fact = next(iter(str(error).strip().splitlines()), "")
    hint = "" if verbose else " Run again with -v for the traceback."
    _fail(f"unexpected {type(error).__name__}: {fact.rstrip('.')}.{hint}", 1, verbose)


def _fail(message: str, code: int, verbose: bool) -> NoReturn:
    if verbose:
        import traceback

        traceback.print_exc()
    typer.secho(f"sam3x: {message}", err=True, fg="red")
    raise typer.Exit(code) from None
