"""Where an image model comes from, recognized by its structure: Meta's ``Sam3Image`` or transformers' ``Sam3Model``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam3x.errors import SourceError
from sam3x.sources.checkpoint import load_state, some_of
from sam3x.sources.contract import Cut, Expected, ImageModel
from sam3x.sources.encoder import call_factory
from sam3x.sources.image_config import ImageModelConfig
from sam3x.sources.image_model import build_image_model
from sam3x.sources.lint import compare_state
from sam3x.sources.meta.source import is_meta, meta_model
from sam3x.sources.state import config_of, detector_keys
from sam3x.sources.transformers.source import is_transformers, load_folder, transformers_model
from sam3x.spec import ExportSpec


def module_image_source(model: nn.Module, origin: str | None = None, image_size: int | None = None) -> Cut:
    """A live image model, used as it is and never changed.

    Args:
        image_size: side of its square picture; None: read from the model, or 1008 where it does not tell.

    Raises:
        SourceError: it has not the parts of a known image model.
    """
    name = origin or f"{type(model).__module__}.{type(model).__qualname__}"
    if is_transformers(model):
        return lambda spec, expected=None: transformers_model(model, name, spec, expected=expected)
    if not is_meta(model):
        raise SourceError(
            f"{type(model).__name__} is no image model sam3x knows: it has {some_of(n for n, _ in model.named_children())}",
            remedy="Give Meta's Sam3Image or transformers' Sam3Model.",
        )
    size = image_size or _image_size(model)
    return lambda spec, expected=None: meta_model(model, name, size, spec, expected)


def factory_image_source(name: str, image_size: int | None = None) -> Cut:
    """What ``package.module:factory`` returns when called with no arguments, which happens as it is cut: nothing else holds it.

    Raises:
        SourceError: the name, the import, the call or its result is wrong.
    """
    return lambda spec, expected=None: module_image_source(call_factory(name), f"module {name}", image_size)(spec, expected)


def random_image_source(config: ImageModelConfig | None = None) -> Cut:
    """SAM3's own hyper-parameters with seeded random weights, or another size of the same architecture."""
    chosen = config or ImageModelConfig()

    def cut(spec: ExportSpec, expected: Expected | None = None) -> ImageModel:
        origin = f"random weights, seed {spec.seed}, {_described(chosen)}"
        if expected is not None:
            expected.check(origin=origin)  # before a minute goes by in drawing weights
        model = build_image_model(chosen)
        draw_image_weights(model, spec.seed)
        return meta_model(model, origin, chosen.image_size, spec, expected)

    return cut


def checkpoint_image_source(path: str | Path) -> Cut:
    """The image model in one of Meta's checkpoints; sizes come from the shapes.

    Raises:
        SourceError: it is no SAM3 checkpoint, or parts of it are missing, mis-shaped or not finite.
    """

    def cut(spec: ExportSpec, expected: Expected | None = None) -> ImageModel:
        state = detector_keys(load_state(path))
        config = config_of(state, str(path))
        model = build_image_model(config, device="meta")
        load_image_weights(model, state, str(path))
        return meta_model(model, f"checkpoint {Path(path).name}, {_described(config)}", config.image_size, spec, expected)

    return cut


def transformers_image_source(folder: str | Path) -> Cut:
    """A folder that ``Sam3Model.save_pretrained`` or ``Sam3LiteTextModel.save_pretrained`` wrote.

    Raises:
        SourceError: it holds no such model, its tokenizer cannot be read, or transformers is missing.
    """
    path = Path(folder)

    def cut(spec: ExportSpec, expected: Expected | None = None) -> ImageModel:
        model = load_folder(path)
        return transformers_model(model, f"transformers {type(model).__name__} in {path.name}", spec, path, expected)

    return cut


def load_image_weights(model: nn.Module, state: Mapping[str, Tensor], subject: str) -> None:
    """Give ``model`` (built on the meta device) the weights of a checkpoint, float32 ones mapped and not copied.

    Raises:
        SourceError: missing, mis-shaped or non-finite weights.
    """
    findings = compare_state(model.state_dict(), state)
    if findings.errors:
        raise SourceError(f"{subject} does not fit its own shapes: {'; '.join(findings.errors)}")
    wanted = {name: _plain(state[name], value) for name, value in model.state_dict().items()}
    model.load_state_dict(wanted, strict=True, assign=True)
    for module in model.modules():
        for name, value in list(module._buffers.items()):
            if value is not None and value.device.type == "meta":  # buffers that no checkpoint holds
                module._buffers[name] = _rebuilt(module, name)


def _plain(value: Tensor, like: Tensor) -> Tensor:
    return value if value.is_complex() or not value.is_floating_point() else value.to(torch.float32)


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


def _image_size(model: Any) -> int:
    """The picture a ViT trunk's global rotary embedding was made for; 1008, SAM3's own, for other trunks."""
    trunk = model.get_submodule("backbone.vision_backbone.trunk") if hasattr(model.backbone.vision_backbone, "trunk") else model
    patch = getattr(getattr(trunk, "patch_embed", None), "proj", None)
    tables = [value for name, value in trunk.named_buffers() if name.endswith("freqs_cis")]
    if patch is None or not tables:
        return ImageModelConfig().image_size
    side = round(max(len(table) for table in tables) ** 0.5)
    return side * patch.stride[0]


def _described(config: ImageModelConfig) -> str:
    kind = "SAM3" if config == ImageModelConfig() else "a SAM3 of other sizes"
    return f"{kind}, {config.image_size} pixels, ViT of {config.depth} layers, text of {config.text_layers} layers"
