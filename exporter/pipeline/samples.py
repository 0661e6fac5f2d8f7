"""What components are verified with: inputs that eager components make of each other, and every branch of a fusion encoder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sam3x.capture.program import Sample
from sam3x.capture.samples import clamped, samples_for, thinned, verification_sizes
from sam3x.fusion.encoder import FusionEncoder
from sam3x.pipeline.request import Request
from sam3x.sources.contract import Component, ImageModel, Model, walk
from sam3x.sources.names import INTERACTIVE_HEAD, PADDING

_ATTEMPTS = 8
_NEAR, _FAR = 1.001, 0.1  # a picture's features so near give answers no further apart, as fractions of the largest value


def samples_of(model: Model, request: Request, tell: Callable[[str], None] = lambda _: None) -> dict[str, list[Sample]]:
    """Component → samples at several sizes, the first of a common kind.

    Those of an image model come with their eager outputs; a fusion encoder whose flags are inputs has some for every branch.
    Nothing runs that ``request.components`` do not need.
    """
    found: dict[str, list[Sample]] = {component.name: [] for component in model.components}
    if isinstance(model, ImageModel):
        tell("eager components")
        found = _walked(model, request)
    for component in (item for item in model.components if item.name in request.components):
        if isinstance(component.module, FusionEncoder) and (component.module.flag_names or not found[component.name]):
            found[component.name] += _of_branches(component.module, peaked=request.numerics.below is not None)
    return found


def feeding(components: Sequence[Component], chosen: Collection[str]) -> list[Component]:
    """Return ``chosen`` and those whose outputs they read, directly or through others, in the order they run."""
    needed: list[Component] = []
    read: set[str] = set()
    for component in reversed(components):
        if component.name in chosen or read & {component.renamed.get(name, name) for name in component.outputs}:
            needed.append(component)
            read |= {port.tensor for port in component.inputs}
    return needed[::-1]


def _of_branches(encoder: FusionEncoder, *, peaked: bool) -> list[Sample]:
    """Every branch at sizes other than the traced ones."""
    spec, sizes = encoder.spec, verification_sizes(encoder.spec, peaked=peaked)
    samples = samples_for(encoder.input_names, encoder.flag_names, spec, encoder.d_model, len(encoder.layers), sizes)
    return samples if spec.verify == "full" else thinned(samples)


def _walked(model: ImageModel, request: Request) -> dict[str, list[Sample]]:
    """Many prompts, one prompt, boxes that are padding, as far as the ranges allow."""
    spec, needed = request.spec, feeding(model.components, request.components)
    sizes = [(3, min(5, model.context_length), 2, 4), (1, model.context_length, 1, 1)]
    if spec.verify == "full":
        sizes.append((4, max(2, model.context_length // 2), 5, 3))
    found: dict[str, list[Sample]] = {component.name: [] for component in model.components}
    vision = None
    for index, (prompts, length, boxes, queries) in enumerate(sizes if model.context_length else sizes[:1]):
        prompts = clamped(prompts, spec.batch)
        length = model.context_length if model.fixed_length else length
        case = f"{prompts} prompts, length {length}, {boxes} boxes, {queries} queries"
        given = seeded_inputs(model, prompts, length, boxes, spec.seed + index)
        trace = walk(needed, given, lambda value, count=queries: value[:, :count], vision)  # type: ignore[misc]
        for component in (item for item in needed if item.name in trace):
            if component.name != "vision_encoder" or vision is None:
                inputs, outputs = trace[component.name]
                found[component.name].append(
                    Sample(branch=branch_of(component), case=case, inputs=inputs, expected=outputs, large=True)
                )
        vision = trace.get("vision_encoder")
    for component in needed:
        if component.name == INTERACTIVE_HEAD and vision is not None:
            found[component.name] = list(_clicked(component, vision[1], model, spec.seed))
    return found


def _clicked(head: Component, picture: Mapping[str, Tensor], model: ImageModel, seed: int) -> Iterator[Sample]:
    """Objects of a box and points, a mask alone and a point; one point; a mask alone."""
    alone = (-1,) * (0 if model.clicks is None else model.clicks.rows_of_mask_alone)
    for given_labels, masks in ((((2, 3, 1, 0, -1), alone, (1, -1)), 2), (((1, -1),), 0), ((alone,), 1)):
        objects = clamped(len(given_labels), head.ranges["prompts"])
        rows = max(1, *(len(own) for own in given_labels))
        labels = [(*own, *(PADDING,) * (rows - len(own))) for own in given_labels]
        size = picture["high_res_feats_0"].shape[-2:]
        for attempt in range(_ATTEMPTS):
            generator = torch.Generator().manual_seed(seed + attempt)
            given = {
                "point_coords": torch.rand((objects, rows, 2), generator=generator) * model.image_size,
                "point_labels": torch.tensor([labels[index % len(labels)] for index in range(objects)]),
                "mask_input": torch.randn((objects, 1, *size), generator=generator) * 4,
                "has_mask_input": torch.arange(objects) < masks,
            }
            inputs = head.feed({**{name: value[:1] for name, value in picture.items()}, **given})
            expected = head.eager(inputs)
            if settled_choice(head, inputs, expected):
                break
        case = f"{objects} objects, {rows} points, {min(masks, objects)} masks"
        yield Sample(branch=branch_of(head), case=case, inputs=inputs, expected=expected, large=True)


def settled_choice(head: Component, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether the interactive head's choice by stability is not on an edge, where rounding turns it."""
    near = head.eager({**inputs, "image_embed": inputs["image_embed"] * _NEAR})
    return all(bool((near[name] - value).abs().max() < _FAR * value.abs().max()) for name, value in expected.items())


def branch_of(component: Component) -> str:
    """The flags that the pipeline feeds, in words."""
    return " ".join(f"{name}={value.tolist()}" for name, value in component.constants.items()) or "fixed"


def seeded_inputs(model: ImageModel, prompts: int, length: int, boxes: int, seed: int) -> dict[str, Tensor]:
    """Outer inputs: noise for a picture, texts of several lengths, prompts with all, some and no boxes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, max(2, model.vocab_size), (prompts, length), generator=generator)
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
