"""Reading a folder of transformers': a model, or what of a video model sees pictures; no weight random or dropped unsaid."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sam3x.errors import SourceError
from sam3x.sources.checkpoint import ADAPTER_CONFIG, adapter_error
from sam3x.sources.encoder import reason_of, untouched
from sam3x.sources.report import LintReport
from sam3x.sources.transformers.source import is_tracker, is_transformers, is_video

_VIDEO = {"sam3_video": "Sam3Model", "sam3_lite_text_video": "Sam3LiteTextModel"}
"""``model_type`` of a video model → the class of its detector, which reads such a folder."""

_WHOLE_VIDEO = "sam3_video"
_DETECTOR = "detector_model."
_TRACKERS = ("tracker_model.", "tracker_neck.")
_OF_CLICKS = ("prompt_encoder.", "mask_decoder.", "shared_image_embedding.", "no_memory_embedding")
"""What of a tracker answers clicks on a picture."""
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFolder:
    """A folder's model, and what was found; ``model`` is fit for use only where the report lets it be."""

    model: nn.Module
    report: LintReport


def read_folder(folder: Path) -> ReadFolder:
    """A model that is known here, saved with ``save_pretrained``: safetensors only, no code of the folder's.

    Raises:
        SourceError: transformers is missing, or the folder holds no such model.
    """
    kind = _model_type(folder)
    with untouched():
        try:
            import torchvision  # noqa: F401 - transformers pools boxes by it, and would miss it only when it does
            import transformers
        except ImportError as error:
            package = (error.name or "transformers").partition(".")[0]
            raise SourceError(f"reading it needs {package}", remedy='Install it: pip install "sam3x[transformers]".') from None
        loader: Any = getattr(transformers, _class_of(kind, folder))
        try:
            with _no_progress_bar():
                model, loaded = loader.from_pretrained(
                    str(folder),
                    local_files_only=True,
                    use_safetensors=True,
                    dtype=torch.float32,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
        except Exception as error:  # transformers raises many kinds
            raise SourceError(f"{folder} cannot be loaded by transformers ({reason_of(error)})") from error
    if not (is_transformers(model) or is_tracker(model) or is_video(model)):
        remedy = "Give a Sam3Model, a Sam3LiteTextModel, a Sam3TrackerModel or a Sam3VideoModel."
        raise SourceError(f"{folder} holds a {type(model).__name__}", remedy=remedy)
    return ReadFolder(model=model.eval(), report=_report(folder, kind, model, loaded))


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws a bar of its own for the weights, among the steps of the command line."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _class_of(kind: str, folder: Path) -> str:
    """The class that reads the folder: of a video model the whole, where its tracker can answer clicks, else the detector."""
    whole = kind == _WHOLE_VIDEO and any(_of_clicks(name) and "prompt_encoder." in name for name in _stored(folder))
    return "Sam3VideoModel" if whole else _VIDEO.get(kind, "AutoModel")


def _of_clicks(name: str) -> bool:
    """Whether a tracker's weight answers clicks on a picture; ``save_pretrained`` of transformers 5.24 doubles its prefix."""
    tracker, neck = _TRACKERS
    own = name.removeprefix(tracker).removeprefix(tracker)
    return name.startswith(neck) or (name.startswith(tracker) and own.startswith(_OF_CLICKS))


def _model_type(folder: Path) -> str:
    """What ``config.json`` says that the folder holds.

    Raises:
        SourceError: it is absent or cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise adapter_error(folder)
        raise SourceError(f"{folder} has no config.json", remedy="Give a folder that transformers' save_pretrained wrote.")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read ({reason_of(error)})", remedy="Download or save it again.") from error
    kind = given.get("model_type") if isinstance(given, dict) else None
    return kind if isinstance(kind, str) else ""


def _report(folder: Path, kind: str, model: nn.Module, loaded: dict[str, Any]) -> LintReport:
    stored, whole = _stored(folder), is_video(model)
    apart = {name for name in stored if name.startswith(_TRACKERS) and not (whole and _of_clicks(name))}
    computed = {name for name, _ in model.named_buffers()} - set(model.state_dict())
    unexpected = sorted(set(loaded["unexpected_keys"]) - (set() if whole else apart))
    strange = [name for name in unexpected if not {name, name.removeprefix(_DETECTOR)} & computed]
    dtypes = {_DTYPES.get(dtype, dtype) for name, dtype in stored.items() if name not in apart}
    low = sorted(dtypes - {"float32"})
    what = "the detector and the tracker's interactive head" if whole else "the detector"
    notes = [f"{what} of a video model ({kind})"] if kind in _VIDEO else []
    if apart:
        counts = Counter(part for name in sorted(apart) for part in _TRACKERS if name.startswith(part))
        rest = ", ".join(f"'{name}' ({count})" for name, count in counts.items())
        notes.append(f"left out, not part of the image model: {rest}")
    if len(strange) < len(unexpected):
        notes.append(f"{len(unexpected) - len(strange)} stored tables computed again by transformers")
    if low:
        notes.append(f"{' and '.join(low)} weights, exported as float32")
    weights = model.state_dict()
    report = LintReport(
        path=str(folder),
        kind="transformers",
        parameters=sum(value.numel() for value in model.parameters()),
        dtypes=tuple(sorted(dtypes)) or ("float32",),
        metadata={"class": type(model).__name__},
        notes=tuple(notes),
        missing=tuple(sorted(loaded["missing_keys"])),
        unexpected=tuple(strange),
        misshaped=tuple(str(item[0] if isinstance(item, tuple) else item) for item in loaded.get("mismatched_keys") or ()),
        mistyped=tuple(name for name, value in weights.items() if value.is_meta),
        not_finite=tuple(
            name for name, value in weights.items() if not value.is_meta and not bool(torch.isfinite(value).all())
        ),
        traps=tuple(str(text) for text in loaded.get("error_msgs") or ()),
    )
    exports = ("interactive head",) if is_tracker(model) else ("image model", *(("interactive head",) if whole else ()))
    return report if report.faults else report.model_copy(update={"exports": exports})


def _stored(folder: Path) -> dict[str, str]:
    """Name → type of every tensor in the folder's safetensors files, from their headers.

    Raises:
        SourceError: a file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    found: dict[str, str] = {}
    try:
        files = [folder / "model.safetensors"]
        if index.is_file() and not files[0].is_file():
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in sorted(set(listed.values()))]
        for file in files:
            with safe_open(str(file), framework="pt") as opened:
                names = list(opened.keys())
                found.update({name: opened.get_slice(name).get_dtype() for name in names})
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{folder} cannot be read ({reason_of(error)})", remedy="Download or save it again.") from error
    return found
