"""A pipeline in eager torch with the rounding of a lower precision, for a back end that cannot run on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from sam3x.runtime.segmenter import Segmenter
from sam3x.sources.contract import Component, ImageModel
from sam3x.verify.emulate import eager_in


class EmulatedSegmenter(Segmenter):
    """The ``Segmenter`` of an exported folder, whose components are those of its source, rounded as ``precision`` rounds.

    Args:
        folder: a pipeline exported from ``model``: what it says of pictures, words and thresholds is used, its files are not.
        precision: ``tf32``, ``fp16`` or ``bf16``, see ``sam3x.verify.emulate.eager_in``.
    """

    def __init__(self, folder: str | Path, model: ImageModel, precision: str) -> None:
        super().__init__(folder)
        self._components = _Eager(  # type: ignore[assignment]
            {item.name: item for item in model.components},
            {item.name: item.writes for item in self.manifest.components},
            precision,
        )


class _Eager:
    def __init__(self, components: Mapping[str, Component], writes: Mapping[str, Mapping[str, str]], precision: str) -> None:
        self._components, self._writes, self._precision = components, writes, precision

    def run(self, name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        component = self._components[name]
        given = {port.tensor: torch.from_numpy(np.ascontiguousarray(tensors[port.tensor])) for port in component.inputs}
        with torch.no_grad(), eager_in(self._precision):
            outputs = component.eager(component.feed(given))
        return {self._writes[name][key]: value.numpy() for key, value in outputs.items()}

    def close(self) -> None:
        pass
