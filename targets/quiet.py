"""Keep a back end's warnings about its own workings from the user."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def suppressed_output() -> Iterator[None]:
    """No logger speaks below an error, even one that sets its own level when it is imported, and no progress bar is drawn."""
    level, disabled = logging.getLogger().level, logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
        logging.getLogger().setLevel(level)


@contextlib.contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Let the loggers of these names speak of errors alone; their levels are put back afterwards."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def native_silence() -> Iterator[None]:
    """What native code writes to stderr is dropped, and shown after an error. The process's stderr comes back."""
    try:
        before = os.dup(2)
    except OSError:  # no stderr at all
        yield
        return
    with tempfile.TemporaryFile() as said:
        sys.stderr.flush()
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(before, 2)
            said.seek(0)
            os.write(2, said.read())
            raise
        finally:
            os.dup2(before, 2)
            os.close(before)
