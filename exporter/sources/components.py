"""The components with the contract's ports, around the modules that a source brings."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sam3x.sources.contract import Component, Port
from sam3x.sources.names import INTERACTIVE_HEAD, MAX_BOXES, MAX_IMAGES, MAX_POINTS, MAX_PROMPTS


def ranges_of(
    context_length: int, num_queries: int, *, fixed_length: bool, prompts: tuple[int, int] = (1, MAX_PROMPTS)
) -> dict[str, tuple[int, int]]:
    """Inclusive sizes of the contract's dynamic dimensions; ``prompts`` bounds pictures too, for back ends that plan memory."""
    lowest = context_length if fixed_length else 1
    return {
        "images": (1, min(MAX_IMAGES, prompts[1])),
        "prompts": prompts,
        "boxes": (1, MAX_BOXES),
        "text_length": (lowest, context_length),
        "prompt_length": (lowest + 2, context_length + MAX_BOXES + 1),
        "queries": (1, num_queries),
        "points": (1, MAX_POINTS),
    }


def build_components(
    modules: Mapping[str, nn.Module],
    levels: int,
    ranges: Mapping[str, tuple[int, int]],
    *,
    attention_mask: bool,
    fusion: Component | None = None,
) -> tuple[Component, ...]:
    """Components in the order in which they run.

    Args:
        modules: adapter by component name, of those that the source has.
        levels: feature maps beside the tokens (``fpn_0``, …).
        attention_mask: whether the text encoder is told which tokens are padding.
        fusion: a fusion encoder that sam3x captures with its branches, in place of an adapter.
    """
    fpn = tuple(f"fpn_{index}" for index in range(levels))
    text = Port(name="input_ids", dims=("prompts", "text_length"))
    mask = (Port(name="attention_mask", dims=("prompts", "text_length")),) if attention_mask else ()
    one_picture = Port(name="image_tokens", dims=(None, None, None))
    tokens = Port(name="image_tokens", dims=("prompts", None, None))
    position = Port(name="image_pos", dims=(None, None, None))
    encoded = Port(name="encoded", dims=("prompts", None, None))
    prompt = (
        Port(name="prompt", dims=("prompts", "prompt_length", None)),
        Port(name="prompt_mask", dims=("prompts", "prompt_length")),
    )
    features = (
        Port(name="text_features", dims=("prompts", "text_length", None)),
        Port(name="text_mask", dims=("prompts", "text_length")),
    )
    boxes = (
        Port(name="boxes", dims=("prompts", "boxes", None)),
        Port(name="box_labels", dims=("prompts", "boxes")),
        Port(name="box_mask", dims=("prompts", "boxes")),
    )
    picture = (Port(name="image", dims=("images", None, None, None)),)
    maps = tuple(Port(name=name, dims=(None, None, None, None)) for name in fpn)
    clicks = ("high_res_feats_0", "high_res_feats_1", "image_embed") if INTERACTIVE_HEAD in modules else ()
    click_prompt = (
        Port(name="point_coords", dims=("prompts", "points", None)),
        Port(name="point_labels", dims=("prompts", "points")),
        Port(name="mask_input", dims=("prompts", None, None, None)),
        Port(name="has_mask_input", dims=("prompts",)),
    )
    click_maps = tuple(Port(name=name, dims=(None, None, None, None)) for name in ("image_embed", *clicks[:2]))
    queries = Port(name="queries", dims=("prompts", "queries", None))
    ports: dict[str, tuple[tuple[Port, ...], tuple[str, ...]]] = {
        "vision_encoder": (picture, ((*fpn, "image_tokens", "image_pos") if "decoder" in modules else ()) + clicks),
        "text_encoder": ((text, *mask), ("text_features", "text_mask")),
        "prompt_encoder": ((*features, *boxes, one_picture, position), ("prompt", "prompt_mask")),
        "fusion_encoder": ((tokens, position, *prompt), ("encoded",)),
        "decoder": ((encoded, position, *prompt), ("pred_boxes", "pred_logits", "presence_logit_dec", "queries")),
        "mask_head": ((queries, encoded, *prompt, *maps), ("pred_masks",)),
        INTERACTIVE_HEAD: ((*click_prompt, *click_maps), ("low_res_masks", "iou_predictions")),
    }
    return tuple(
        fusion if name == "fusion_encoder" and fusion is not None else _component(name, modules[name], *ports[name], ranges)
        for name in ports
        if name in modules or (name == "fusion_encoder" and fusion is not None)
    )


def _component(
    name: str, module: nn.Module, inputs: tuple[Port, ...], outputs: tuple[str, ...], ranges: Mapping[str, tuple[int, int]]
) -> Component:
    used = {dim for port in inputs for dim in port.dims if dim}
    limits = {dim: limit for dim, limit in ranges.items() if dim in used}
    return Component(name=name, module=module.eval(), inputs=inputs, outputs=outputs, ranges=limits)
