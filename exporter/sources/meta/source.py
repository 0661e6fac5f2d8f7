"""Meta's ``Sam3Image`` as components. Recognized by what it has, not by where its class was imported from."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sam3x.errors import SourceError
from sam3x.fusion.encoder import FusionEncoder
from sam3x.fusion.shadow import shadow_of, shallow_copy
from sam3x.sources.components import build_components, ranges_of
from sam3x.sources.contract import Clicks, Component, Expected, ImageModel, Port
from sam3x.sources.encoder import weights_hash
from sam3x.sources.meta import parts as meta
from sam3x.sources.meta.picture_size import resize
from sam3x.sources.names import INTERACTIVE_HEAD
from sam3x.spec import ExportSpec

_PARTS = (
    "backbone.vision_backbone",
    "backbone.language_backbone",
    "geometry_encoder",
    "transformer.encoder",
    "transformer.decoder",
    "segmentation_head",
)
_VOCABULARY, _WORDS = "assets/bpe_simple_vocab_16e6.txt.gz", 49408
"""Where ``sam3.model_builder`` looks for its vocabulary, and how many tokens that has."""


def is_meta(model: nn.Module) -> bool:
    """Whether ``model`` has the parts of ``Sam3Image``."""
    try:
        return all(model.get_submodule(name) is not None for name in _PARTS)
    except AttributeError:
        return False


def tracker_of(model: nn.Module) -> nn.Module | None:
    """What answers clicks: an interactive predictor's tracker, where the neck has its branch; else None."""
    predictor = getattr(model, "inst_interactive_predictor", None)
    branch = getattr(model.get_submodule("backbone.vision_backbone"), "sam2_convs", None)
    return None if predictor is None or branch is None else predictor.model


def meta_model(
    model: nn.Module, origin: str, image_size: int, spec: ExportSpec, expected: Expected | None = None
) -> ImageModel:
    """Split a ``Sam3Image`` into components. The model is left as it is: adapters work on a second tree over its tensors.

    Args:
        image_size: side of the picture it was built for. spec: dac, pre_norm, branches of the fusion encoder, and the side that
            pictures are to have.

    Raises:
        SourceError: it uses more than one feature level, or cannot take pictures of that size.
        ArtifactError: its weights are not those ``expected``.
    """
    weights_sha256 = weights_hash(model)
    if expected is not None:
        expected.check(weights_sha256=weights_sha256)
    if model.num_feature_levels != 1:
        raise SourceError(f"num_feature_levels is {model.num_feature_levels}; sam3x takes 1, as in SAM3")
    predictor = getattr(model, "inst_interactive_predictor", None)
    model = _for_pictures(model)
    shadow: Any = private_shadow(model)
    tracker: Any = tracker_of(shadow)
    notes = []
    if spec.image_size is not None and spec.image_size != image_size:
        notes.append(resize(shadow, image_size, spec.image_size, tracker))
        image_size = spec.image_size
    text = shadow.backbone.language_backbone
    fresh: Any = private_shadow(shadow)  # its caches would hold tensors without values
    maps = shapes_of(lambda: fresh.backbone.forward_image(torch.zeros((1, 3, image_size, image_size))))["backbone_fpn"]
    size, levels = maps[-1].shape[-1], len(maps) - 1
    fixed = not isinstance(getattr(text.encoder, "positional_embedding", None), nn.Parameter)  # students stretch positions
    ranges = ranges_of(text.context_length, shadow.transformer.decoder.num_queries, fixed_length=fixed, prompts=spec.batch)
    modules = {
        "vision_encoder": meta.VisionEncoder(without(shadow.backbone, "language_backbone"), tracker),
        "text_encoder": meta.TextEncoder(text),
        "prompt_encoder": meta.PromptEncoder(shadow.geometry_encoder, size),
        "decoder": meta.Decoder(_heads(shadow), size),
        "mask_head": meta.MaskHead(shadow.segmentation_head, size),
    }
    if tracker is not None:
        modules[INTERACTIVE_HEAD] = meta.InteractiveHead(tracker)
    vocab_size = max(table.num_embeddings for table in text.modules() if isinstance(table, nn.Embedding))
    limits = {"tokens": (size * size,) * 2, "batch": ranges["prompts"], "prompt_length": ranges["prompt_length"]}
    fusion = fusion_component(shadow.transformer.encoder, spec.model_copy(update=limits), ranges)
    return ImageModel(
        components=build_components(modules, levels, ranges, attention_mask=False, fusion=fusion),
        image_size=image_size,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        context_length=text.context_length,
        fixed_length=fixed,
        vocab_size=vocab_size,
        pad_id=0,
        box_text="visual",
        origin=origin,
        weights_sha256=weights_sha256,
        notes=tuple(notes),
        tokenizer=_installed_vocabulary() if vocab_size == _WORDS else None,
        clicks=None if tracker is None else _clicks(predictor),
    )


def _installed_vocabulary() -> Path | None:
    """Return the list of merges of the installed ``sam3``: EfficientSAM3's has one, beside the package, Meta's has none."""
    package = importlib.util.find_spec("sam3")
    places = [Path(place) for place in (package.submodule_search_locations or ())] if package else []
    found = (folder / _VOCABULARY for place in places for folder in (place, place.parent))
    return next((path for path in found if path.is_file()), None)


def _for_pictures(model: nn.Module) -> nn.Module:
    """``model``, whose interactive predictor has not its scripted transforms, nor its tracker's memory of frames."""
    tracker = tracker_of(model)
    copy = without(model, "inst_interactive_predictor")
    if tracker is not None:
        heads = ("sam_prompt_encoder", "sam_mask_decoder")
        predictor = nn.Module()
        predictor.model = without(tracker, *(name for name, _ in tracker.named_children() if name not in heads))
        copy._modules["inst_interactive_predictor"] = predictor
    return copy


def _clicks(predictor: Any) -> Clicks:
    """As the predictor's ``SAM2Transforms`` says, else as it is by default."""
    own = getattr(predictor, "_transforms", None)
    return Clicks(
        mask_threshold=float(getattr(own, "mask_threshold", 0.0)),
        max_hole_area=float(getattr(own, "max_hole_area", 256.0)),
        max_sprinkle_area=float(getattr(own, "max_sprinkle_area", 0.0)),
        rows_of_mask_alone=0,
        largest_logit=32.0,
    )


def fusion_component(encoder: nn.Module, spec: ExportSpec, ranges: dict[str, tuple[int, int]]) -> Component:
    """The fusion encoder of ``sam3x export``, branches included, between the pipeline's tensors."""
    wrapped = FusionEncoder(encoder, spec)
    own = torch.tensor([bool(layer.pre_norm) for layer in wrapped.layers])
    flags = {"dac": torch.tensor(False), "pre_norm": own if spec.pre_norm == "per-layer" else own[0]}
    prompt, mask = ("prompts", "prompt_length", None), ("prompts", "prompt_length")
    sources = {
        "tgt": Port(name="tgt", dims=("prompts", None, None), source="image_tokens"),
        "query_pos": Port(name="query_pos", dims=("prompts", None, None), source="image_pos"),
        "memory": Port(name="memory", dims=prompt, source="prompt"),
        "memory_key_padding_mask": Port(name="memory_key_padding_mask", dims=mask, source="prompt_mask"),
    }
    return Component(
        name="fusion_encoder",
        module=wrapped,
        inputs=tuple(sources.get(name, Port(name=name, dims=())) for name in wrapped.input_names),
        outputs=wrapped.output_names,
        ranges={name: ranges[name] for name in ("prompts", "prompt_length")},
        renamed={wrapped.output_names[0]: "encoded"},
        constants={name: flags[name] for name in wrapped.flag_names},
    )


def private_shadow(model: nn.Module) -> nn.Module:
    """A second tree over the same tensors, with caches of its own: upstream fills plain dicts while it runs."""
    shadow = shadow_of(model)
    for module in shadow.modules():
        for name, value in list(module.__dict__.items()):
            if type(value) is dict and not name.startswith("_"):
                module.__dict__[name] = dict(value)
        stored = module.__dict__.get("compilable_stored_size")
        if any(isinstance(size, Tensor) for size in stored or ()):  # the decoder's, of a run; a trace would ask for its value
            module.__dict__.update(compilable_cord_cache=None, compilable_stored_size=None)
    return shadow


def without(module: nn.Module, *names: str) -> nn.Module:
    """``module`` over the same children, less the named ones: what a component does not hold can be freed before it."""
    copy = shallow_copy(module)
    copy.__dict__["_modules"] = {name: child for name, child in module.named_children() if name not in names}
    return copy


def _heads(shadow: Any) -> nn.Module:
    """What ``_run_decoder`` uses of a ``Sam3Image``."""
    heads = without(shadow, "backbone", "geometry_encoder", "segmentation_head")
    heads.__dict__["_modules"]["transformer"] = without(shadow.transformer, "encoder")
    return heads


def shapes_of(run: Callable[[], Any]) -> Any:
    """What ``run`` returns, as tensors without values: a second of shapes in place of half a minute of a ViT."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        return run()
