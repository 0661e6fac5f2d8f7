"""Reading a fusion encoder's weights out of SAM3 and EfficientSAM3 checkpoints, without running anything stored in them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam3x.errors import SourceError
from sam3x.sources.archive import archive_fault

SUFFIXES = (".pt", ".pth", ".safetensors")
WRAPPERS = ("model", "state_dict", "model_state_dict")
_LAYER_KEY = re.compile(r"^(?P<prefix>(?:.*\.)?)layers\.(?P<index>\d+)\.(?P<part>self_attn|cross_attn_image)\.(?P<rest>.+)$")
_LAYER_INDEX = re.compile(r"layers\.(\d+)\.")
# Sam3DetrEncoder in transformers; its layers also name the norms and the MLP otherwise
_TRANSFORMERS_KEY = re.compile(r"(?:^|\.)detr_encoder\.layers\.\d+\.(?:self_attn|cross_attn)\.q_proj\.")
_SHOWN = 8
_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began files before it wrote zip archives
_SAVE_AGAIN = "Save the weights alone: torch.save(model.state_dict(), path)."
_TEXT = ("is a text file, not a checkpoint (a login page instead of the download?)", "Download it again.")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundEncoder:
    """The encoder's part of a checkpoint: keys without ``prefix``, tensors as stored."""

    prefix: str
    state: dict[str, Tensor]


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a .pt, .pth or .safetensors file, unwrapped from ``{"model": …}`` and the like.

    Raises:
        SourceError: no such file, not a checkpoint, damaged, or a pickle with more than tensors (refused, never executed).
    """
    path = Path(path)
    head = _head(path)
    state = _load_safetensors(path, head) if path.suffix.lower() == ".safetensors" else _load_torch(path, head)
    if not isinstance(state, Mapping):
        raise _error(path, f"holds a {type(state).__name__}, not named weights", _SAVE_AGAIN)
    tensors = _unwrap(state)
    if not tensors:
        raise _error(path, f"holds no tensors ({some_of(map(str, state))})", _SAVE_AGAIN)
    return tensors


def _unwrap(state: Mapping[Any, Any], depth: int = 0) -> dict[str, Tensor]:
    """The tensors of the innermost wrapper that has any; bounded, for a pickled dict may contain itself."""
    for name in WRAPPERS if depth < 5 else ():
        if isinstance(state.get(name), Mapping):
            inner = _unwrap(state[name], depth + 1)
            if inner:
                return inner
    return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _error(path: Path, fact: str, remedy: str) -> SourceError:
    return SourceError(f"{path} {fact}", remedy=remedy)


def some_of(names: Iterable[str], total: int | None = None) -> str:
    """The first few names and how many there are."""
    names = list(names)
    total = len(names) if total is None else total
    if not total:
        return "it is empty"
    rest = f", … ({total} in all)" if total > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def _head(path: Path) -> bytes:
    """The first bytes, once the name has been checked."""
    try:
        if path.is_dir():
            inside = sorted(item.name for item in path.iterdir() if item.suffix.lower() in SUFFIXES)
            raise _error(
                path, "is a folder", f"Name the file in it: {some_of(inside) if inside else 'a .pt, .pth or .safetensors'}."
            )
        if not path.exists():
            raise _error(path, "does not exist", "Check the path given as --checkpoint.")
        if not path.is_file():
            raise _error(path, "is not a regular file", "Give a .pt, .pth or .safetensors file.")
        if path.suffix.lower() not in SUFFIXES:
            ending = f"ends in {path.suffix!r}" if path.suffix else "has no file name ending"
            raise _error(path, f"{ending}, which says no known format", "Give a .pt, .pth or .safetensors file.")
        with path.open("rb") as file:
            head = file.read(256)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        remedy = "Check its permissions." if isinstance(error, PermissionError) else ""
        raise _error(path, f"cannot be read ({getattr(error, 'strerror', None) or error})", remedy) from error
    if not head:
        raise _error(path, "is an empty file", "Download or save it again.")
    if head.startswith(b"version https://git-lfs"):
        raise _error(path, "is a git-lfs pointer, not the weights themselves", "Fetch them with git lfs pull.")
    return head


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] == b"{" and head[6:8] == b"\0\0"


def _load_torch(path: Path, head: bytes) -> Any:
    if _is_safetensors(head):
        raise _error(path, f"is a safetensors file named {path.suffix}", "Rename it to end in .safetensors.")
    if _is_text(head):
        raise _error(path, *_TEXT)
    if head.startswith(b"\x80") and not head.startswith(_TORCH_MAGIC):
        raise _error(path, "is a plain pickle, which may hold code: refused, nothing in it was executed", _SAVE_AGAIN)
    zipped = head.startswith(b"PK")
    fault = archive_fault(path) if zipped else None
    if fault:
        raise _error(path, *fault)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises almost anything: EOFError, KeyError, IndexError, struct.error, …
        raise _error(path, *_load_failure(error)) from error


def _load_failure(error: Exception) -> tuple[str, str]:
    """What torch's exception says, and a remedy."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})", "Check its permissions." if isinstance(error, PermissionError) else ""
    if "TorchScript" in text:
        return "is a TorchScript archive, which holds code: refused, nothing in it was executed", _SAVE_AGAIN
    if not isinstance(error, pickle.UnpicklingError):
        reason = re.split(r"\n|\. ", text, maxsplit=1)[0][:160] or type(error).__name__
        return f"is damaged, cut short, or no PyTorch file ({reason})", "Download or save it again."
    named = re.search(r"GLOBAL ([\w.]+)", text)
    if named or re.search(r"[Uu]nsupported (global|class)|[Bb]locked", text):
        what = f"{named[1]} is no tensor" if named else "not only tensors"
        return f"is a pickle with code or objects in it ({what}): refused, nothing in it was executed", _SAVE_AGAIN
    return "is damaged or no PyTorch file", "Download or save it again."


def _load_safetensors(path: Path, head: bytes) -> Any:
    if head.startswith(b"PK") or head.startswith(b"\x80"):
        raise _error(path, "is a PyTorch file named .safetensors", "Rename it to end in .pt.")
    if _is_text(head):
        raise _error(path, *_TEXT)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise _error(path, "needs the safetensors package", 'Install it: pip install "sam3x[onnx]".') from error
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise _error(path, f"is damaged, cut short, or no safetensors file ({error})", "Download or save it again.") from error


def find_encoder(state: Mapping[str, Tensor], subject: str = "the checkpoint") -> FoundEncoder:
    """The fusion encoder's weights under whatever prefix they have.

    A fusion layer is what has both ``self_attn`` and ``cross_attn_image``: the DETR decoder, the text encoder and the geometry
    encoder do not. The tracker's memory encoder does, and is told apart by its separate q, k and v projections.

    Raises:
        SourceError: none, several, or one whose projections are stored apart.
    """
    parts: dict[str, set[str]] = {}
    fused: set[str] = set()
    for key in state:
        match = _LAYER_KEY.match(key)
        if match:
            parts.setdefault(match["prefix"], set()).add(match["part"])
            if match["rest"].startswith("in_proj_"):
                fused.add(match["prefix"])
    encoders = sorted(prefix for prefix, found in parts.items() if len(found) == 2)
    usable = [prefix for prefix in encoders if prefix in fused]
    detectors = [prefix for prefix in usable if "detector" in prefix.split(".")]
    usable = detectors if len(detectors) == 1 else usable
    if len(usable) == 1:
        prefix = usable[0]
        return FoundEncoder(
            prefix=prefix, state={key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        )
    if usable:
        named = ", ".join(f"'{prefix}'" for prefix in usable)
        raise _misfit(
            subject, f"has {len(usable)} fusion encoders, under {named}", "Save the one you mean in a file of its own."
        )
    apart = [key for key in state if _TRANSFORMERS_KEY.search(key)]
    if apart:
        fact = f"is in the layout of transformers, with q, k and v apart ({apart[0]}), where Meta's has one in_proj_weight"
        raise _misfit(subject, fact, "Give Meta's sam3.pt, or pass the live module to sam3x.export.")
    if encoders:
        fact = f"keeps q, k and v apart under '{encoders[0]}', as the tracker's memory encoder does, not the fusion encoder"
        raise _misfit(subject, fact, "Give the checkpoint of the whole SAM3 image model.")
    fact = "has no fusion encoder: no keys <prefix>layers.0.self_attn.in_proj_weight and <prefix>layers.0.cross_attn_image.…"
    raise _misfit(subject, fact, f"It has: {some_of(state)}. Give a SAM3 or EfficientSAM3 checkpoint.")


def _misfit(subject: str, fact: str, remedy: str) -> SourceError:
    return SourceError(f"{subject} {fact}", remedy=remedy)


def hyper_parameters(found: FoundEncoder, subject: str = "the checkpoint") -> dict[str, Any]:
    """What the shapes tell of ``FusionConfig``; heads, norm order, activation and position flags leave no trace in them.

    Raises:
        SourceError: a layer is missing in between, or the width cannot be told.
    """
    state = found.state
    indices = {int(match[1]) for match in map(_LAYER_INDEX.match, state) if match}
    missing = (max(indices) + 1) - len(indices)
    if missing:
        absent = [f"{found.prefix}layers.{i}" for i in islice((i for i in count() if i not in indices), min(missing, _SHOWN))]
        raise _misfit(subject, f"lacks layers in between: {some_of(absent, missing)}", "Give a complete checkpoint.")
    order = sorted(indices)
    width = _size(state, [f"layers.{i}.norm1.weight" for i in order], 1, 0)
    width = width or _size(state, [f"layers.{i}.self_attn.in_proj_weight" for i in order], 2, 1)
    if not width:
        fact = f"does not tell d_model: {found.prefix}layers.0.norm1.weight is missing or no vector"
        raise _misfit(subject, fact, "Give a complete checkpoint.")
    sizes: dict[str, Any] = {"d_model": width, "num_layers": len(order)}
    hidden = _size(state, [f"layers.{i}.linear1.weight" for i in order], 2, 0)
    levels = _size(state, ["level_embed"], 2, 0)
    sizes.update({"dim_feedforward": hidden} if hidden else {}, **({"num_feature_levels": levels} if levels else {}))
    sizes["add_pooled_text_to_img_feat"] = any(key.startswith("text_pooling_proj.") for key in state)
    return sizes


def _size(state: Mapping[str, Tensor], keys: Iterable[str], rank: int, dim: int) -> int | None:
    return next((state[key].shape[dim] for key in keys if key in state and state[key].dim() == rank), None)


def load_weights(encoder: nn.Module, found: FoundEncoder, subject: str = "the checkpoint") -> str:
    """Give ``encoder`` (built on the meta device or not) the weights found, as float32; returns a note on what was converted.

    Raises:
        SourceError: missing, unexpected or mis-shaped keys, weights that are no plain numbers, or not finite.
    """
    expected = encoder.state_dict()
    full = lambda keys: some_of(found.prefix + key for key in keys)  # noqa: E731
    missing = [key for key in expected if key not in found.state]
    unexpected = [key for key in found.state if key not in expected]
    shapes = [(key, found.state[key], value) for key, value in expected.items() if key in found.state]
    wrong = [f"{key} {tuple(is_.shape)}, not {tuple(want.shape)}" for key, is_, want in shapes if is_.shape != want.shape]
    reports = {"missing": missing, "unexpected": unexpected, "mis-shaped": wrong}
    facts = [f"{kind}: {full(keys)}" for kind, keys in reports.items() if keys]
    if facts:
        what = f"does not fit the fusion encoder that its shapes describe. {'; '.join(facts)}"
        raise _misfit(subject, f"{what}", "Give a complete checkpoint, or the hyper-parameters it was trained with.")
    weights = {key: _plain(found.prefix + key, found.state[key], subject) for key in expected}
    encoder.load_state_dict(weights, strict=True, assign=True)
    converted = sorted({str(found.state[key].dtype).removeprefix("torch.") for key in expected} - {"float32"})
    return f"{' and '.join(converted)} weights converted to float32" if converted else ""


def _plain(key: str, value: Tensor, subject: str) -> Tensor:
    """A float32 copy that no longer depends on the mapped file."""
    plain = value.layout == torch.strided and value.device.type != "meta"
    if not plain or value.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        kind = str(value.dtype).removeprefix("torch.") + ("" if plain else " without stored values or sparse")
        raise _misfit(
            subject, f"holds {key} as {kind}, not plain floating point", "Give the checkpoint before it was quantized."
        )
    copied = value.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(copied).all()):
        bad = int((~torch.isfinite(copied)).sum())
        fact = f"has {bad} NaN or infinite values among the {copied.numel()} of {key}"
        raise _misfit(subject, fact, "Give an undamaged checkpoint.")
    return copied
