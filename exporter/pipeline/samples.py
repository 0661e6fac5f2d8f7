"""What components are verified with: inputs that eager components make of each other, and every branch of a fusion encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sam3x.capture.program import Sample
from sam3x.capture.samples import clamped, samples_for, thinned, verification_sizes
from sam3x.fusion.encoder import FusionEncoder
from sam3x.pipeline.request import Request
from sam3x.sources.contract import Component, ImageModel, Model, walk


def samples_of(model: Model, request: Request, tell: Callable[[str], None] = lambda _: None) -> dict[str, list[Sample]]:
    """Component → samples at several sizes, the first of a common kind.

    Those of an image model come with their eager outputs; a fusion encoder whose flags are inputs has some for every branch.
    """
    found: dict[str, list[Sample]] = {component.name: [] for component in model.components}
    if isinstance(model, ImageModel):
        tell("eager components")
        found = _walked(model, request)
    for component in model.components:
        if isinstance(component.module, FusionEncoder) and (component.module.flag_names or not found[component.name]):
            found[component.name] += _of_branches(component.module, peaked=request.numerics.below is not None)
    return found


def _of_branches(encoder: FusionEncoder, *, peaked: bool) -> list[Sample]:
    """Every branch at sizes other than the traced ones."""
    spec, sizes = encoder.spec, verification_sizes(encoder.spec, peaked=peaked)
    samples = samples_for(encoder.input_names, encoder.flag_names, spec, encoder.d_model, len(encoder.layers), sizes)
    return samples if spec.verify == "full" else thinned(samples)


def _walked(model: ImageModel, request: Request) -> dict[str, list[Sample]]:
    """Many prompts, one prompt, boxes that are padding, as far as the ranges allow."""
    spec = request.spec
    sizes = [(3, min(5, model.context_length), 2, 4), (1, model.context_length, 1, 1)]
    if spec.verify == "full":
        sizes.append((4, max(2, model.context_length // 2), 5, 3))
    found: dict[str, list[Sample]] = {component.name: [] for component in model.components}
    vision = None
    for index, (prompts, length, boxes, queries) in enumerate(sizes):
        prompts = clamped(prompts, spec.batch)
        length = model.context_length if model.fixed_length else length
        case = f"{prompts} prompts, length {length}, {boxes} boxes, {queries} queries"
        given = _given(model, prompts, length, boxes, spec.seed + index)
        trace = walk(model.components, given, lambda value, count=queries: value[:, :count], vision)  # type: ignore[misc]
        for component in model.components:
            if component.name != "vision_encoder" or vision is None:
                inputs, outputs = trace[component.name]
                found[component.name].append(
                    Sample(branch=branch_of(component), case=case, inputs=inputs, expected=outputs, large=True)
                )
        vision = trace["vision_encoder"]
    return found


def branch_of(component: Component) -> str:
    """The flags that the pipeline feeds, in words."""
    return " ".join(f"{name}={value.tolist()}" for name, value in component.constants.items()) or "fixed"


def _given(model: ImageModel, prompts: int, length: int, boxes: int, seed: int) -> Mapping[str, Tensor]:
    """Seeded outer inputs: noise for a picture, texts of several lengths, prompts with all, some and no boxes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.vocab_size, (prompts, length), generator=generator)
    box_mask = torch.zeros((prompts, boxes), dtype=torch.bool)
    for row in range(prompts):
        ids[row, max(2, length - row * 2) :] = model.pad_id
        box_mask[row, max(0, boxes - row) :] = True
    if prompts == 1:
        box_mask[:] = True
    corner = torch.rand((prompts, boxes, 2), generator=generator) * 0.5 + 0.25
    extent = torch.rand((prompts, boxes, 2), generator=generator) * 0.4 + 0.05
    return {
        "image": torch.randn((1, 3, model.image_size, model.image_size), generator=generator),
        "input_ids": ids,
        "attention_mask": torch.arange(length)[None] < (length - 2 * torch.arange(prompts)[:, None]).clamp(min=2),
        "boxes": torch.cat([corner, extent], dim=-1),
        "box_labels": torch.randint(0, 2, (prompts, boxes), generator=generator),
        "box_mask": box_mask,
    }
