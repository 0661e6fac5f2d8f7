"""What a caller's own warning filters must not do: turn a library's warning into a failure of an export or a run."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any


class _Filters:
    """The process's filters while any thread is within ``warnings_not_raised``: the last one out puts them back."""

    def __init__(self) -> None:
        self.lock, self.within = threading.Lock(), 0
        self.changed: Any = None

    def enter(self) -> None:
        with self.lock:
            self.within += 1
            if self.changed is None and any(action == "error" for action, *_ in warnings.filters):
                self.changed = warnings.catch_warnings()
                self.changed.__enter__()
                _show_what_raises()

    def leave(self) -> None:
        with self.lock:
            self.within -= 1
            if self.changed is not None and self.within == 0:
                self.changed.__exit__(None, None, None)
                self.changed = None


_filters = _Filters()


@contextlib.contextmanager
def warnings_not_raised() -> Iterator[None]:
    """Within it a filter that raises (``python -W error``) shows the warning instead; every other filter stays as it is.

    Where no filter raises nothing is touched.
    """
    _filters.enter()
    try:
        yield
    finally:
        _filters.leave()


def _show_what_raises() -> None:
    before: list[Any] = list(warnings.filters)
    warnings.resetwarnings()
    for action, message, category, module, line in before:
        shown: Any = "default" if action == "error" else action
        warnings.filterwarnings(shown, _pattern(message), category, _pattern(module), line, append=True)


def _pattern(compiled: Any) -> str:
    """The regular expression of a filter, which is compiled, a text, or None."""
    return str(getattr(compiled, "pattern", compiled) or "")
