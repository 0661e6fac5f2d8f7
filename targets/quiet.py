"""Keep a back end's warnings about its own workings from the user."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def hushed() -> Iterator[None]:
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
