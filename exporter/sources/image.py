"""Where an image model comes from, recognized by its structure: Meta's ``Sam3Image``, transformers' models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam3x.errors import SourceError
from sam3x.sources.checkpoint import read_checkpoint, some_of
from sam3x.sources.contract import Expected, ImageModel, ImageSourceFactory
from sam3x.sources.encoder import call_factory
from sam3x.sources.image_config import ImageModelConfig
from sam3x.sources.image_model import build_image_model
from sam3x.sources.lint import Judged, judge
from sam3x.sources.meta.source import is_meta, meta_model
from sam3x.sources.transformers.folder import read_folder
from sam3x.sources.transformers.source import is_tracker, is_transformers, is_video, tracker_model, transformers_model
from sam3x.spec import ExportSpec


def module_image_source(model: nn.Module, origin: str | None = None, image_size: int | None = None) -> ImageSourceFactory:
    """A live image model, used as it is and never changed.

    Args:
        image_size: side of its square picture; None: read from the model, or 1008 where it does not tell.

    Raises:
        SourceError: it has not the parts of a known image model.
    """
    name = origin or f"{type(model).__module__}.{type(model).__qualname__}"
    if is_transformers(model) or is_video(model):
        return lambda spec, expected=None: transformers_model(model, name, spec, expected=expected)
    if is_tracker(model):
        return lambda spec, expected=None: tracker_model(model, name, spec, expected)
    if not is_meta(model):
        raise SourceError(
            f"{type(model).__name__} is no image model sam3x knows: it has {some_of(n for n, _ in model.named_children())}",
            remedy="Give Meta's Sam3Image, or transformers' Sam3Model, Sam3TrackerModel or Sam3VideoModel.",
        )
    size = image_size or _image_size(model)
    return lambda spec, expected=None: meta_model(model, name, size, spec, expected)


def factory_image_source(name: str, image_size: int | None = None) -> ImageSourceFactory:
    """What ``package.module:factory`` returns. It is called as the source is split, so that nothing else holds the model.

    Raises:
        SourceError: the name, the import, the call or its result is wrong.
    """
    return lambda spec, expected=None: module_image_source(call_factory(name), f"module {name}", image_size)(spec, expected)


def random_image_source(config: ImageModelConfig | None = None) -> ImageSourceFactory:
    """SAM3's own hyper-parameters with seeded random weights, or another size of the same architecture."""
    chosen = config or ImageModelConfig()

    def build(spec: ExportSpec, expected: Expected | None = None) -> ImageModel:
        origin = f"random weights, seed {spec.seed}, {chosen.description}"
        if expected is not None:
            expected.check(origin=origin)  # before a minute goes by in drawing weights
        model = build_image_model(chosen)
        draw_image_weights(model, spec.seed)
        return meta_model(model, origin, chosen.image_size, spec, expected)

    return build


def checkpoint_image_source(path: str | Path, weights_key: str | None = None) -> ImageSourceFactory:
    """The image model in one of Meta's checkpoints, SAM 3.1's detector among them, or one of EfficientSAM3's, whose package
    builds it; sizes come from names and shapes.

    Args:
        weights_key: which weights of a file that has several, see ``read_checkpoint``.

    Raises:
        SourceError: it is no SAM3 checkpoint, or weights of it are missing, unexpected, mis-shaped or not finite.
    """

    def build(spec: ExportSpec, expected: Expected | None = None) -> ImageModel:
        checkpoint = read_checkpoint(path, weights_key)
        judged = judge(checkpoint)
        origin = f"checkpoint {checkpoint.path.name}, {judged.description}"
        split = meta_model(load_judged(judged), origin, judged.image_size, spec, expected)
        return replace(split, notes=(*split.notes, *judged.report.notes))

    return build


def transformers_image_source(folder: str | Path) -> ImageSourceFactory:
    """A folder of transformers': ``Sam3Model`` or ``Sam3LiteTextModel``, alone or as the detector of a video model,
    ``Sam3TrackerModel``, which answers clicks, or ``Sam3VideoModel``, whose detector and tracker do for words and clicks.

    Raises:
        SourceError: it holds no such model, its weights are missing, unexpected or not finite, its tokenizer cannot be read, or
            transformers is missing.
    """
    path = Path(folder)

    def build(spec: ExportSpec, expected: Expected | None = None) -> ImageModel:
        read = read_folder(path)
        read.report.refuse()
        origin = f"transformers {type(read.model).__name__} in {path.name}"
        split = (
            tracker_model(read.model, origin, spec, expected)
            if is_tracker(read.model)
            else transformers_model(read.model, origin, spec, path, expected)
        )
        return replace(split, notes=(*split.notes, *read.report.notes))

    return build


def load_judged(judged: Judged) -> nn.Module:
    """The model of a checkpoint that has been judged, with its weights: float32 ones mapped and not copied.

    Raises:
        SourceError: something stands in the way.
    """
    judged.report.refuse()
    model, weights = judged.model, judged.weights
    assert model is not None and weights is not None
    model.load_state_dict(weights, strict=False, assign=True)  # compared name by name; a tracker's memory of frames is not used
    for module in model.modules():
        for name, value in list(module._buffers.items()):
            if value is not None and value.device.type == "meta":  # buffers that no checkpoint holds
                module._buffers[name] = _rebuilt(module, name)
    return model


def _rebuilt(module: nn.Module, name: str) -> Tensor:
    if name == "attn_mask" and hasattr(module, "build_causal_mask"):
        with torch.device("cpu"):
            return module.build_causal_mask()  # type: ignore[operator]
    raise SourceError(f"the buffer '{name}' of {type(module).__name__} is neither stored nor rebuilt")


def draw_image_weights(model: nn.Module, seed: int) -> None:
    """Unit-scale weights that differ in every layer: matrices with std 1/√fan_in, norms around 1, biases small, not zero."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    norms = {
        f"{name}.weight"
        for name, child in model.named_modules()
        if isinstance(child, (nn.LayerNorm, nn.GroupNorm)) or "Norm" in type(child).__name__
    }
    tables = {f"{name}.weight" for name, child in model.named_modules() if isinstance(child, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if name in norms:
                parameter.copy_(1 + 0.1 * noise)
            elif name in tables:
                parameter.copy_(noise)
            elif parameter.dim() > 1:
                parameter.copy_(noise / (parameter.numel() / parameter.shape[0]) ** 0.5)
            else:
                parameter.copy_(0.1 * noise)
        for name, table in model.named_buffers():
            if name.endswith(("positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding")):
                # upstream draws it, from a seed of nobody's
                table.copy_(torch.randn(table.shape, generator=generator))


def _image_size(model: Any) -> int:
    """The picture a ViT trunk's global rotary embedding was made for; 1008, SAM3's own, for other trunks."""
    trunk = model.get_submodule("backbone.vision_backbone.trunk") if hasattr(model.backbone.vision_backbone, "trunk") else model
    patch = getattr(getattr(trunk, "patch_embed", None), "proj", None)
    tables = [value for name, value in trunk.named_buffers() if name.endswith("freqs_cis")]
    if patch is None or not tables:
        return ImageModelConfig().image_size
    side = round(max(len(table) for table in tables) ** 0.5)
    return side * patch.stride[0]
