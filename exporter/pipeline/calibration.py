"""Run eager components on the user's own pictures and keep their inputs, from which scales of activations are taken."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam3x.capture.samples import clamped
from sam3x.pipeline.request import Request
from sam3x.pipeline.samples import feeding, seeded_inputs
from sam3x.runtime.pictures import open_picture, picture_files, to_tensor
from sam3x.sources.contract import ImageModel, Model, walk
from sam3x.sources.names import INTERACTIVE_HEAD

MOST = 8
"""Pictures of a folder that are taken: each is held in memory with all that eager components make of it."""

_PROMPTS, _BOXES, _QUERIES = 2, 2, 4

Inputs = Mapping[str, Tensor]


def calibration_inputs(model: Model, request: Request) -> dict[str, list[Inputs]]:
    """Component → inputs, one for each picture, with seeded words and boxes; nothing where no folder was named.

    A component that clicks alone feed has none: its samples of verification are what it is calibrated with.

    Raises:
        SpecError: the folder holds no picture. ArtifactError: a file is none.
    """
    folder = getattr(request.options, "calibrate", "")
    found: dict[str, list[Inputs]] = {component.name: [] for component in model.components}
    if not folder or not isinstance(model, ImageModel):
        return found
    needed = [item for item in feeding(model.components, request.components) if item.name != INTERACTIVE_HEAD]
    length = model.context_length if model.fixed_length else min(5, model.context_length)
    prompts = clamped(_PROMPTS, request.spec.batch)
    for index, file in enumerate(picture_files(Path(folder))[:MOST]):
        given: dict[str, Any] = dict(seeded_inputs(model, prompts, length, _BOXES, request.spec.seed + index))
        pixels = to_tensor(open_picture(file), model.image_size, model.mean, model.std)
        trace = walk(needed, {**given, "image": torch.from_numpy(pixels)}, lambda value: value[:, :_QUERIES])
        for name, (inputs, _) in trace.items():
            found[name].append(inputs)
    return found
