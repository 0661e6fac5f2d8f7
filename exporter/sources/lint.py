"""What a checkpoint is, and what keeps it from being exported: one judgement for ``sam3x lint`` and ``sam3x export``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam3x.errors import SourceError
from sam3x.sources.checkpoint import INDEX, Checkpoint, read_checkpoint, some_of
from sam3x.sources.efficient import build_student, fitted, student_of, unwrapped
from sam3x.sources.encoder import encoder_in, reason_of
from sam3x.sources.image_config import ImageModelConfig
from sam3x.sources.image_model import build_image_model
from sam3x.sources.report import LintReport
from sam3x.sources.rotary import TABLE, rotary_tables, sound_tables
from sam3x.sources.state import (
    GROUPS,
    NECK,
    TEXT,
    TRUNK,
    ImagePart,
    config_of,
    follows_frames,
    image_part,
    is_sam31,
    is_vit,
    layers_in,
    missing_sizes,
)

_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LIVE = "Load it with the package it was made with, and export the model with --module package.module:factory."
_ONE_TRUNK = "Save the weights of one of them, or export the live model with --module package.module:factory."


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A checkpoint's image model: the report, and what a loader needs where nothing stands in the way.

    Attributes:
        description: of the model, a phrase. image_size: side of its picture.
        model: on the meta device, but for the rotary tables, or a student's as its package builds it.
        weights: for every name in its state dict that a picture needs, float32 or complex64.
    """

    report: LintReport
    description: str = ""
    image_size: int = ImageModelConfig().image_size
    model: nn.Module | None = None
    weights: Mapping[str, Tensor] | None = None


def lint(path: str | Path, weights_key: str | None = None) -> LintReport:
    """Look at a checkpoint, or a folder of transformers', without running anything in it.

    Args:
        weights_key: which weights of a file that has several, see ``read_checkpoint``.

    Raises:
        SourceError: it cannot be read as a checkpoint at all.
    """
    if (Path(path) / "config.json").is_file():
        from sam3x.sources.transformers.folder import read_folder

        return read_folder(Path(path)).report
    checkpoint = read_checkpoint(path, weights_key)
    report = judge(checkpoint).report
    try:
        encoder = encoder_in(checkpoint)
    except SourceError:
        return report
    report = report.model_copy(update={"exports": (*report.exports, "fusion encoder")})
    if report.kind != "unknown":
        return report
    config = encoder.config
    metadata = {"sizes": f"width {config.d_model}, {config.num_layers} layers"} if config else {}
    count = sum(value.numel() for value in encoder.module.state_dict().values())
    return report.model_copy(update={"kind": "fusion encoder", "metadata": metadata, "parameters": count, "traps": ()})


def judge(checkpoint: Checkpoint) -> Judged:
    """The image model in a checkpoint against the model that its shapes describe: names, shapes, types, values, rotary tables.

    Raises:
        SourceError: it has several image models, or its bytes are not those that were saved.
    """
    subject = str(checkpoint.path)
    part = image_part(checkpoint.state, subject)
    state = part.state
    kind = kind_of(checkpoint.state, part)
    checkpoint.check_bytes(name for name in checkpoint.state if name.startswith(part.prefix))
    floats = sorted({str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()})
    low = [name for name in floats if name != "float32"]
    report = LintReport(
        path=subject,
        kind=kind,
        parameters=sum(value.numel() for value in state.values() if value.is_floating_point()),
        dtypes=tuple(sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})),
        metadata={},
        notes=(*checkpoint.notes, *part.notes, *([f"{' and '.join(low)} weights, exported as float32"] if low else [])),
    )
    index = _SHARD.sub(INDEX, checkpoint.path.name)
    if index != checkpoint.path.name:
        report = report.model_copy(update={"remedy": f"It is one of several shards; give {index}, which lists them all."})
    if kind == "unknown":
        trap = f"no part of an image model: it has {some_of(checkpoint.state)}"
        return Judged(report=report.model_copy(update={"traps": (trap,), "remedy": "Give a SAM3 checkpoint."}))
    if kind == "transformers":
        remedy = "Export the folder it lies in: sam3x export --pipeline --source transformers --checkpoint FOLDER."
        trap = "the layout of transformers, whose sizes stand in the config.json beside it"
        return Judged(report=report.model_copy(update={"traps": (trap,), "remedy": remedy}))
    if kind == "EfficientSAM3":
        return _student(report, state, checkpoint.path.name)
    report = report.model_copy(update={"traps": tuple(_traps(state)), "missing": tuple(missing_sizes(state))})
    if _student_keys(state):
        report = report.model_copy(update={"remedy": _ONE_TRUNK})
    if report.missing or report.traps:
        return Judged(report=report)
    return _compared(report, state, subject)


def _compared(report: LintReport, state: Mapping[str, Tensor], subject: str) -> Judged:
    """The judgement of a checkpoint whose sizes can be told."""
    config = config_of(state, subject)
    scales = config.neck_scales
    if report.kind == "SAM 3.1" and layers_in(state, NECK) < len(scales):
        config = config.model_copy(update={"neck_scales": scales[: layers_in(state, NECK)] or scales})
    try:
        model = build_image_model(config, device="meta")
    except SourceError:
        raise
    except Exception as error:  # upstream asserts, or divides
        trap = f"its shapes contradict each other ({reason_of(error)})"
        return Judged(report=report.model_copy(update={"traps": (trap,)}))
    stored = any(name.endswith(f".{TABLE}") for name in state)
    report = report.model_copy(update={"metadata": _metadata(config)})
    if not stored and _is_released(config):
        rebuilt = f"rotary tables are not stored; rebuilt for SAM3's {config.image_size} pixels"
        report = report.model_copy(update={"notes": (*report.notes, rebuilt)})
    return _against(
        model,
        state if stored or not _is_released(config) else {**state, **rotary_tables(model)},
        report,
        interactive=config.interactive,
        description="SAM 3.1's detector" if report.kind == "SAM 3.1" else config.description,
        image_size=config.image_size,
    )


def _against(model: nn.Module, state: Mapping[str, Tensor], report: LintReport, *, interactive: bool, **told: Any) -> Judged:
    """Compare the weights with those that ``model`` takes, name by name.

    Args:
        interactive: whether it has the head for clicks. told: the rest of what ``Judged`` holds.
    """
    tables, notes, lost = sound_tables(rotary_tables(model), state)
    expected = {name: value for name, value in model.state_dict().items() if not follows_frames(name)}
    found = {**state, **tables}
    shapes = [(name, found[name], want) for name, want in expected.items() if name in found]
    misshaped = [
        f"{name} {tuple(have.shape)}, not {tuple(want.shape)}" for name, have, want in shapes if have.shape != want.shape
    ]
    mistyped = [f"{name} {_type_of(have)}, not {_kind_of(want)}" for name, have, want in shapes if not _is_like(have, want)]
    wrong_type = {text.split()[0] for text in mistyped}
    traps = [f"{name} is no rotary table, and what is stored does not tell which to rebuild" for name in lost]
    report = report.model_copy(
        update={
            "notes": (*report.notes, *notes),
            "missing": tuple(name for name in expected if name not in found),
            "unexpected": tuple(name for name in found if name not in expected),
            "misshaped": tuple(misshaped),
            "mistyped": tuple(text for text in mistyped if text.split()[0] not in lost),
            "traps": (*report.traps, *traps),
            "not_finite": tuple(name for name, have, _ in shapes if name not in wrong_type and not _is_finite(have)),
        }
    )
    if report.faults:
        return Judged(report=report)
    head = ("interactive head",) if interactive else ()
    report = report.model_copy(update={"exports": ("image model", *head)})
    return Judged(report=report, model=model, weights={name: _float32(value) for name, value, _ in shapes}, **told)


def _is_released(config: ImageModelConfig) -> bool:
    """Whether the sizes that shapes do tell are those of the release, whose picture and windows are then its own."""
    own = ImageModelConfig()
    names = ("patch_size", "embed_dim", "depth", "vit_heads", "mlp_ratio", "pretrain_img_size")
    return all(getattr(config, name) == getattr(own, name) for name in names)


def _type_of(value: Tensor) -> str:
    stored = value.layout == torch.strided and not value.is_meta
    return str(value.dtype).removeprefix("torch.") + ("" if stored else " without stored values or sparse")


def _kind_of(value: Tensor) -> str:
    return "floating point" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")


def _is_like(value: Tensor, wanted: Tensor) -> bool:
    """Whether a stored tensor holds plain numbers of the wanted kind: of any precision, but not quantized."""
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.dtype in _FLOATS if wanted.is_floating_point() else value.is_complex() == wanted.is_complex()


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(torch.view_as_real(value) if value.is_complex() else value).all())


def _float32(value: Tensor) -> Tensor:
    return value.to(torch.float32) if value.is_floating_point() else value


def kind_of(state: Mapping[str, Tensor], part: ImagePart) -> str:
    """Whose checkpoint it is, by the names in it."""
    if any(".detr_encoder." in f".{key}" or key.startswith("detector_model.") for key in state):
        return "transformers"
    own = part.state
    if not any(key.startswith(prefix) for key in own for prefix in GROUPS):
        return "unknown"
    text = any(key.startswith("backbone.language_backbone.") for key in own)
    if (_trunk_keys(own) and not is_vit(own)) or (text and not any(key.startswith(TEXT) for key in own)) or _student_text(own):
        return "EfficientSAM3"
    return "SAM 3.1" if is_sam31(state) else "SAM3"


def _trunk_keys(state: Mapping[str, Tensor]) -> list[str]:
    return [name for name in state if name.startswith(TRUNK)]


def _student_keys(state: Mapping[str, Tensor]) -> list[str]:
    return [name for name in _trunk_keys(state) if "student" in name.removeprefix(TRUNK)]


def _student_text(state: Mapping[str, Tensor]) -> bool:
    """Whether the text encoder is not Meta's: none of the names that only Meta's has."""
    own = (f"{TEXT}transformer.resblocks.", f"{TEXT}token_embedding.")
    texts = [name for name in state if name.startswith(TEXT)]
    return bool(texts) and not any(name.startswith(own) or name == f"{TEXT}positional_embedding" for name in texts)


def missing_groups(state: Mapping[str, Tensor]) -> list[str]:
    """Parts of the image model that the checkpoint has nothing of."""
    return [prefix for prefix in GROUPS if not any(key.startswith(prefix) for key in state)]


def _student(report: LintReport, state: Mapping[str, Tensor], file: str) -> Judged:
    """The judgement of a student's checkpoint, whose model the installed package builds."""
    traps = _traps(state)
    remedy = _ONE_TRUNK if _student_keys(state) and is_vit(state) else report.remedy
    state = unwrapped(state)
    try:
        student = student_of(state, file)
        report = report.model_copy(update={"metadata": student.metadata})
        model = None if traps else build_student(student)
    except SourceError as error:
        model, traps, remedy = None, [*traps, error.fact], error.remedy or _LIVE
    if model is None:
        not_finite = (name for name, value in state.items() if value.is_floating_point() and not _is_finite(value))
        return Judged(
            report=report.model_copy(update={"traps": tuple(traps), "not_finite": tuple(not_finite), "remedy": remedy})
        )
    return _against(model, fitted(state, student), report, interactive=student.interactive, description=student.description)


def _metadata(config: ImageModelConfig) -> dict[str, str]:
    return {
        "picture": f"{config.image_size} pixels, patches of {config.patch_size}",
        "trunk": f"ViT, {config.depth} layers, width {config.embed_dim}",
        "text encoder": f"{config.text_layers} layers, width {config.text_width}, vocabulary {config.vocab_size:,}",
        "context length": f"{config.context_length} tokens",
        "after them": f"width {config.d_model}, {config.encoder_layers} fusion and {config.decoder_layers} decoder layers",
    }


def _traps(state: Mapping[str, Tensor]) -> list[str]:
    found = [f"nothing under '{prefix}'" for prefix in missing_groups(state)]
    if "geometry_encoder." in missing_groups(state):
        found[found.index("nothing under 'geometry_encoder.'")] += (
            " (one released EfficientSAM3 file lacks it; prompts would use random weights)"
        )
    student = _student_keys(state)
    if student and is_vit(state):
        found.append(f"both the teacher's ViT and a student's trunk ({student[0]}): which of them is meant")
    return found
