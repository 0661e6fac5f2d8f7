"""A vocabulary into ``tokenizer.json``, which the runtime reads without torch, ftfy or regex."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

from sam3x.errors import SourceError
from sam3x.sources.contract import ImageModel

TOKENIZER = "tokenizer.json"
_BEGIN, _END = "<start_of_text>", "<end_of_text>"
_PATTERN = r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_QUOTES = {"‘": "'", "’": "'", "‚": "'", "‛": "'", "“": '"', "”": '"', "„": '"', "‟": '"'}
_MAGIC = b"\x1f\x8b"


def write_tokenizer(source: str | Path | None, folder: Path, model: ImageModel) -> str | None:
    """Write ``tokenizer.json`` into ``folder``; None where there is no vocabulary to write.

    Args:
        source: upstream's ``bpe_simple_vocab_16e6.txt.gz``, a ``tokenizer.json``, or a folder that holds one.

    Raises:
        SourceError: not a vocabulary, or not the size of the model's.
    """
    if source is None:
        return None
    path = Path(source)
    path = path / TOKENIZER if path.is_dir() else path
    try:
        with path.open("rb") as stream:
            packed = stream.read(2) == _MAGIC
        if packed:
            _from_merges(path, model).save(str(folder / TOKENIZER))
        else:
            shutil.copyfile(path, folder / TOKENIZER)
        size = _load(folder / TOKENIZER).get_vocab_size()
    except OSError as error:
        raise SourceError(f"--tokenizer {path} cannot be read ({error.strerror or error})") from error
    if size > model.vocab_size:
        raise SourceError(
            f"--tokenizer {path} has {size} tokens, the text encoder takes {model.vocab_size}",
            remedy="Give the vocabulary that the model was trained with.",
        )
    return TOKENIZER


def _load(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise SourceError(f"the tokenizer is no file of Hugging Face's tokenizers ({error})") from error


def _from_merges(path: Path, model: ImageModel) -> Any:
    """CLIP's byte-pair encoding out of its list of merges, as ``sam3.model.tokenizer_ve.SimpleTokenizer`` builds it."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SourceError(f"--tokenizer {path} is damaged ({error})", remedy="Download it again.") from error
    pairs = [line.split() for line in lines[1 : 49152 - 256 - 2 + 1]]
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    letters = _bytes_to_unicode()
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), _BEGIN, _END]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    quotes = [normalizers.Replace(old, new) for old, new in _QUOTES.items()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *quotes, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    special = [(_BEGIN, vocabulary[_BEGIN]), (_END, vocabulary[_END])]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{_BEGIN} $A {_END}", special_tokens=special)
    return tokenizer


def _bytes_to_unicode() -> list[str]:
    """The letter of each byte in the order of CLIP's vocabulary: printable bytes first, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
