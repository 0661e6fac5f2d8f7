"""Words to token ids with Hugging Face's tokenizers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam3x.errors import ArtifactError, Step, TargetUnavailableError
from sam3x.runtime.pictures import INSTALL


class Tokenizer:
    """A ``tokenizer.json`` and the rules of one model.

    Args:
        path: file in tokenizers' format; begin and end tokens are added by its post-processor.
        context_length: most tokens; a longer text is cut, and its last token is then the end token.
        unescape_html: read ``&amp;`` as ``&``.
    """

    def __init__(self, path: Path, context_length: int, *, unescape_html: bool) -> None:
        try:
            from tokenizers import Tokenizer as Loader
        except ImportError:
            raise TargetUnavailableError("reading words needs the tokenizers package", remedy=INSTALL, step=Step.RUN) from None
        try:
            self._tokenizer: Any = Loader.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ArtifactError(f"{path} is no tokenizer file ({error})", remedy="Export again.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.context_length, self.unescape_html = context_length, unescape_html

    def __call__(self, text: str) -> list[int]:
        """Token ids of one text, begin and end included."""
        cleaned = html.unescape(html.unescape(text)) if self.unescape_html else text
        ids = self._tokenizer.encode(" ".join(cleaned.split())).ids
        return ids if len(ids) <= self.context_length else [*ids[: self.context_length - 1], ids[-1]]


def pad(rows: Sequence[Sequence[int]], context_length: int, pad_id: int, *, fixed_length: bool) -> np.ndarray:
    """Rows of ids as one int64 array, short ones filled up with ``pad_id``: to ``context_length``, or to the longest."""
    length = context_length if fixed_length else max(map(len, rows))
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    return ids
