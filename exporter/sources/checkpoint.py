"""Reading named weights out of checkpoint files, without running anything stored in them."""

from __future__ import annotations

import json
import pickle
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3x.errors import SourceError
from sam3x.sources.archive import archive_fault, weights_fault
from sam3x.sources.lora import is_adapter_name, merge_adapters

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
INDEX = ".safetensors.index.json"
WRAPPERS = ("model", "state_dict", "model_state_dict")
ADAPTER_CONFIG = "adapter_config.json"
_DEEPEST = 5  # a pickled dict may contain itself
_SHOWN = 8
_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began files before it wrote zip archives
_SAVE_AGAIN = "Save the weights alone: torch.save(model.state_dict(), path)."
_AGAIN = "Download or save it again."
_TEXT = "is a text file, not a checkpoint (a login page instead of the download?)"
_WEIGHT_NAME = re.compile(r"\w+(\.[\w-]+)+")  # of a module's weight; paths and file names, which callbacks keep, are none
_TORCH_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""Segments that torch.compile, FSDP, activation checkpointing and Fabric put into names, at any depth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The named weights of one file.

    Attributes:
        state: tensors as stored, under the names they have in the module that was saved.
        place: where in the file they stood, as ``--weights-key`` takes it; empty for the file itself.
        notes: what was chosen, taken out of names or merged, a phrase each.
        merged: names whose values are not those of the file: an adapter was added to them.
    """

    path: Path
    state: Mapping[str, Tensor]
    place: str = ""
    notes: tuple[str, ...] = ()
    merged: frozenset[str] = frozenset()

    def check_bytes(self, names: Iterable[str]) -> None:
        """Compare these weights with the sizes and checksums of the file.

        Raises:
            SourceError: larger than the file, or bits have flipped.
        """
        if self.path.name.lower().endswith(INDEX):
            return  # safetensors compares the sizes of its own files, and has no checksums
        fault = weights_fault(self.path, {name: self.state[name] for name in names if name not in self.merged})
        if fault:
            raise SourceError(f"{self.path} {fault[0]}", remedy=fault[1])


def read_checkpoint(path: str | Path, weights_key: str | None = None) -> Checkpoint:
    """The named weights of a .pt, .pth, .ckpt or .safetensors file, or of the shards that a .safetensors.index.json lists.

    Weights are looked for in ``{"model": …}`` and the like. Names lose the segments of torch's own wrappers, and a LoRA adapter
    beside the weights it adapts is merged.

    Args:
        weights_key: which weights, where a file has several: keys of nested dicts joined by dots (``ema``), or the beginning of
            names in one of them (``ema_model``).

    Raises:
        SourceError: no such file, not a checkpoint, damaged, a pickle with more than tensors (refused, never executed), no or
            several sets of weights, or an adapter that cannot be merged.
    """
    path = Path(path)
    content = _load(path)
    if not isinstance(content, Mapping):
        raise SourceError(f"{path} holds a {type(content).__name__}, not named weights", remedy=_SAVE_AGAIN)
    places = dict(_places(content, ""))
    if not places:
        raise SourceError(f"{path} holds no tensors ({some_of(map(str, content))})", remedy=_SAVE_AGAIN)
    place, state = _chosen(path, content, places, weights_key)
    notes = [f"weights under '{place}'"] if weights_key else []
    others = [name or "the file itself" for name in places if name != place and not place.startswith(f"{name}.") and name]
    if others and not weights_key:
        others_named = ", ".join(f"'{name}'" for name in others)
        notes.append(f"weights under '{place}', not those under {others_named} (--weights-key)")
    plain = {_plain_name(name): value for name, value in state.items()}
    if len(plain) != len(state):
        twice = next(name for name in state if _plain_name(name) != name and _plain_name(name) in state)
        raise SourceError(
            f"{path} holds both {twice} and {_plain_name(twice)}", remedy="Save the module that torch wrapped alone."
        )
    renamed = sum(name not in plain for name in state)
    if renamed:
        removed = sorted({segment for name in state for segment in name.split(".") if segment in _TORCH_WRAPPERS})
        notes.append(f"{' and '.join(f'{segment!r}' for segment in removed)} taken out of {renamed} names")
    merged: frozenset[str] = frozenset()
    if any(map(is_adapter_name, plain)):
        plain, merged, note = merge_adapters(plain, _adapter_config(path, content), str(path))
        notes.append(note)
    return Checkpoint(path=path, state=plain, place=place, notes=tuple(notes), merged=merged)


def some_of(names: Iterable[str], total: int | None = None) -> str:
    """The first few names and how many there are."""
    names = list(names)
    total = len(names) if total is None else total
    if not total:
        return "it is empty"
    rest = f", … ({total} in all)" if total > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def _plain_name(name: str) -> str:
    return ".".join(segment for segment in name.split(".") if segment not in _TORCH_WRAPPERS)


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _places(content: Mapping[Any, Any], place: str, depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dict that holds weights, by its place; names without a dot, such as an optimizer's, make none below the top."""
    tensors = _tensors(content)
    wrapped = not place or place.rpartition(".")[2] in WRAPPERS
    if any(_WEIGHT_NAME.fullmatch(name) for name in tensors) or (tensors and wrapped):
        yield place, tensors
    for name, value in content.items() if depth < _DEEPEST else ():
        if isinstance(name, str) and isinstance(value, Mapping):
            yield from _places(value, f"{place}.{name}" if place else name, depth + 1)


def _chosen(
    path: Path, content: Mapping[Any, Any], places: Mapping[str, dict[str, Tensor]], key: str | None
) -> tuple[str, dict[str, Tensor]]:
    """The weights that ``key`` names, or those a reader expects: in ``model`` and the like before anything beside them."""
    if key is None:
        candidates = list(places)
    else:
        candidates = [place for place in places if place == key or place.startswith(f"{key}.")]
        if not candidates:
            return _by_names(path, places, key)
    place = _preferred(candidates, key or "")
    if place is None:
        named = ", ".join(f"'{name}'" for name in candidates)
        raise SourceError(
            f"{path} holds {len(candidates)} sets of weights, under {named}", remedy="Choose one with --weights-key KEY."
        )
    return place, places[place]


def _preferred(places: list[str], at: str) -> str | None:
    """Of several places below ``at``: where the usual wrappers lead, else ``at`` itself, else the only child, else None."""
    below: dict[str, list[str]] = {}
    for place in places:
        if place != at:
            below.setdefault(place[len(at) :].lstrip(".").split(".")[0], []).append(place)
    step = next((name for name in WRAPPERS if name in below), None)
    if step is None and at in places:
        return at
    if step is None and len(below) == 1:
        step = next(iter(below))
    return None if step is None else _preferred(below[step], f"{at}.{step}" if at else step)


def _by_names(path: Path, places: Mapping[str, dict[str, Tensor]], key: str) -> tuple[str, dict[str, Tensor]]:
    """Weights whose names begin with ``key``, in the place a reader expects, else in the only one that has them."""
    having = {place: value for place, value in places.items() if any(name.startswith(f"{key}.") for name in value)}
    preferred = _preferred(list(places), "")
    place = preferred if preferred in having else next(iter(having)) if len(having) == 1 else None
    if place is None:
        beginnings = sorted({name.split(".")[0] for value in places.values() for name in value})
        there = some_of([*(f"'{name}'" for name in places if name), *(f"'{name}'" for name in beginnings)])
        raise SourceError(f"{path} has no weights under '{key}'", remedy=f"--weights-key takes one of {there}.")
    state = {name[len(key) + 1 :]: value for name, value in having[place].items() if name.startswith(f"{key}.")}
    return f"{place}.{key}" if place else key, state


def _adapter_config(path: Path, content: Mapping[Any, Any]) -> Mapping[str, Any]:
    """peft's settings, out of the file or of the adapter_config.json beside it; empty where there are none.

    Raises:
        SourceError: several, and they differ.
    """
    found = [dict(value) for value in _mappings(content) if "lora_alpha" in value]
    beside = path.parent / ADAPTER_CONFIG
    if not found and beside.is_file():
        try:
            given = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise SourceError(f"{beside} cannot be read ({type(error).__name__})", remedy="Save the adapter again.") from error
        found = [given] if isinstance(given, dict) and "lora_alpha" in given else []
    if any(one["lora_alpha"] != found[0]["lora_alpha"] for one in found):
        raise SourceError(f"{path} holds several settings of adapters, with different lora_alpha", remedy=_SAVE_AGAIN)
    return found[0] if found else {}


def _mappings(content: Mapping[Any, Any], depth: int = 0) -> Iterator[Mapping[Any, Any]]:
    yield content
    for value in content.values() if depth < _DEEPEST else ():
        if isinstance(value, Mapping):
            yield from _mappings(value, depth + 1)


def _load(path: Path) -> Any:
    if path.name.lower().endswith(INDEX):
        return _load_shards(path)
    head = _head(path)
    return _load_safetensors(path, head) if path.suffix.lower() == ".safetensors" else _load_torch(path, head)


def _load_shards(index: Path) -> dict[str, Tensor]:
    """The weights of all shards, each where the index says that it is."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise ValueError("weight_map is no object of file names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        fact = f"{index} is no index of shards ({type(error).__name__}: {str(error)[:120]})"
        raise SourceError(fact, remedy=_AGAIN) from error
    state: dict[str, Tensor] = {}
    for name in sorted(set(listed.values())):
        if Path(name).name != name:
            raise SourceError(f"{index} names a shard outside its folder, {name}", remedy=_AGAIN)
        shard = index.parent / name
        state.update(_load_safetensors(shard, _head(shard)))
    absent = [name for name in listed if name not in state]
    unlisted = [name for name in state if name not in listed]
    if absent or unlisted:
        fact = f"in no shard: {some_of(absent)}" if absent else f"in a shard and not in the index: {some_of(unlisted)}"
        raise SourceError(f"{index} does not fit its shards; {fact}", remedy=_AGAIN)
    return state


def _head(path: Path) -> bytes:
    """The first bytes, once the name has been checked."""
    try:
        if path.is_dir():
            raise _folder_error(path)
        if not path.exists():
            raise SourceError(f"{path} does not exist", remedy="Check the path given as --checkpoint.")
        if not path.is_file():
            raise SourceError(f"{path} is not a regular file", remedy="Give a .pt, .pth, .ckpt or .safetensors file.")
        if path.suffix.lower() not in SUFFIXES:
            ending = f"ends in {path.suffix!r}" if path.suffix else "has no file name ending"
            raise SourceError(
                f"{path} {ending}, which says no known format", remedy="Give a .pt, .pth, .ckpt or .safetensors file."
            )
        with path.open("rb") as file:
            head = file.read(256)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        remedy = "Check its permissions." if isinstance(error, PermissionError) else ""
        raise SourceError(f"{path} cannot be read ({reason})", remedy=remedy) from error
    if not head:
        raise SourceError(f"{path} is an empty file", remedy=_AGAIN)
    if head.startswith(b"version https://git-lfs"):
        raise SourceError(f"{path} is a git-lfs pointer, not the weights themselves", remedy="Fetch them with git lfs pull.")
    return head


def _folder_error(path: Path) -> SourceError:
    if (path / ADAPTER_CONFIG).is_file():
        return adapter_error(path)
    inside = sorted(
        item.name for item in path.iterdir() if item.suffix.lower() in SUFFIXES or item.name.lower().endswith(INDEX)
    )
    return SourceError(
        f"{path} is a folder",
        remedy=f"Name the file in it: {some_of(inside) if inside else 'a .pt, .pth, .ckpt or .safetensors'}.",
    )


def adapter_error(path: Path) -> SourceError:
    """That a folder of peft's is given where a model is wanted."""
    return SourceError(
        f"{path} holds a LoRA adapter alone, without the weights it adapts",
        remedy="Merge it in Python (peft's merge_and_unload) and save the merged model.",
    )


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and head[6:8] == b"\0\0"


class _NumpyValue:
    """Stands in for a numpy scalar or array beside the weights: what the pickle would build it from is taken and forgotten."""

    def __init__(self, *parts: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_NUMPY_NAMES = (
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
)
_SAFE_LOCK = threading.Lock()  # torch's list of safe names is one for all threads


def _load_torch(path: Path, head: bytes) -> Any:
    if _is_safetensors(head):
        raise SourceError(f"{path} is a safetensors file named {path.suffix}", remedy="Rename it to end in .safetensors.")
    if _is_text(head):
        raise SourceError(f"{path} {_TEXT}", remedy="Download it again.")
    if head.startswith(b"\x80") and not head.startswith(_TORCH_MAGIC):
        fact = f"{path} is a plain pickle, which may hold code: refused, nothing in it was executed"
        raise SourceError(fact, remedy=_SAVE_AGAIN)
    zipped = head.startswith(b"PK")
    fault = archive_fault(path) if zipped else None
    if fault:
        raise SourceError(f"{path} {fault[0]}", remedy=fault[1])
    # the names stand for a class of ours, so that nothing of numpy's is called either
    names: list[Any] = [(_NumpyValue, name) for name in _NUMPY_NAMES]
    try:
        with _SAFE_LOCK, torch.serialization.safe_globals(names):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises almost anything: EOFError, KeyError, IndexError, struct.error, …
        fact, remedy = _load_failure(error)
        raise SourceError(f"{path} {fact}", remedy=remedy) from error


def _load_failure(error: Exception) -> tuple[str, str]:
    """What torch's exception says, and what to do."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})", "Check its permissions." if isinstance(error, PermissionError) else ""
    if "TorchScript" in text:
        return "is a TorchScript archive, which holds code: refused, nothing in it was executed", _SAVE_AGAIN
    if not isinstance(error, pickle.UnpicklingError):
        reason = re.split(r"\n|\. ", text, maxsplit=1)[0][:160] or type(error).__name__
        return f"is damaged, cut short, or no PyTorch file ({reason})", _AGAIN
    named = re.search(r"GLOBAL ([\w.]+)", text)
    if named or re.search(r"[Uu]nsupported (global|class)|[Bb]locked", text):
        what = f"{named[1]} is no tensor" if named else "not only tensors"
        return f"is a pickle with code or objects in it ({what}): refused, nothing in it was executed", _SAVE_AGAIN
    return "is damaged or no PyTorch file", _AGAIN


def _load_safetensors(path: Path, head: bytes) -> Any:
    if head.startswith(b"PK") or head.startswith(b"\x80"):
        raise SourceError(f"{path} is a PyTorch file named .safetensors", remedy="Rename it to end in .pt.")
    if _is_text(head):
        raise SourceError(f"{path} {_TEXT}", remedy="Download it again.")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise SourceError(f"{path} needs the safetensors package", remedy='Install it: pip install "sam3x[onnx]".') from error
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise SourceError(f"{path} is damaged, cut short, or no safetensors file ({error})", remedy=_AGAIN) from error
