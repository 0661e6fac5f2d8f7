"""The model of a pipeline in Triton Inference Server's Python backend: it asks the component models (business logic scripting).

What a request holds is in docs/serving.md; ``exporter/pipeline/serving.py`` writes the model repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sam3x.artifact.manifest import PipelineManifest, read_manifest
from sam3x.errors import ArtifactError, Sam3xError, SpecError, Step
from sam3x.runtime.components import run_component
from sam3x.runtime.detect import Asked, Found, detect
from sam3x.runtime.pictures import to_tensor
from sam3x.runtime.prompts import fraction, refused, whole_number
from sam3x.sources.names import INTERACTIVE_HEAD

BATCH = 4
"""Prompts that go through the components together, as in ``Segmenter``."""

_OLD_NUMPY = 'Where this Triton\'s Python backend was built for numpy 1, install that for the server: pip install "numpy<2".'
_BOXES = ("boxes", "box_labels", "box_mask")
_INPUTS = ("image", "input_ids", "attention_mask", *_BOXES, "threshold", "max_detections")


class PipelineModel:
    """``TritonPythonModel`` of a pipeline: a picture, token ids and boxes in; masks, boxes and scores out."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the manifest that lies beside ``model.py``; called by the server."""
        manifest = read_manifest(Path(args["model_repository"]) / args["model_version"])
        if not isinstance(manifest, PipelineManifest):
            raise ArtifactError("manifest.json is no pipeline's", step=Step.LOAD)
        self.manifest = manifest
        reads = {item.name: set(item.reads.values()) for item in manifest.components}
        self._of_clicks = reads.pop(INTERACTIVE_HEAD, set()).difference(*reads.values())

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response for each request; what is wrong with one is told in its own. Called by the server."""
        import triton_python_backend_utils as pb_utils

        responses = []
        for request in requests:
            given = {name: pb_utils.get_input_tensor_by_name(request, name) for name in _INPUTS}
            try:
                found = self.answer({name: item.as_numpy() for name, item in given.items() if item is not None})
            except Sam3xError as error:
                responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))))
                continue
            outputs = [pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in found.items()]
            responses.append(pb_utils.InferenceResponse(output_tensors=outputs))
        return responses

    def answer(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``found_prompts``, ``found_scores``, ``found_boxes`` and ``found_masks`` of a request's tensors.

        Raises:
            SpecError: they do not fit together. ArtifactError: a component failed.
        """
        asked, most = self._asked(given), _most(given)
        size = self.manifest.image_size
        if given["image"].shape != (size, size, 3):
            raise refused(f"the picture is {size} x {size} x 3, got {list(given['image'].shape)}")
        tensor = to_tensor(given["image"], size, self.manifest.mean, self.manifest.std)
        features = self.run("vision_encoder", {"image": tensor})
        found: list[Found] = []
        ranges = self.manifest.component("decoder").ranges
        batch = min(BATCH, ranges.get("prompts", (1, 1))[1])
        for start in range(0, len(asked), batch):
            rows = slice(start, start + batch)
            part = Asked(
                tensors={name: value[rows] for name, value in asked.tensors.items()}, thresholds=asked.thresholds[rows]
            )
            found += detect(self.run, self.manifest, features, part, most)
        masks = [item.masks for item in found if len(item.masks)]
        return {
            "found_prompts": np.repeat(np.arange(len(found)), [len(item.scores) for item in found]),
            "found_scores": np.concatenate([item.scores for item in found]),
            "found_boxes": np.concatenate([item.boxes for item in found]),
            "found_masks": np.concatenate(masks) if masks else np.zeros((0, 1, 1), dtype=np.float32),
        }

    def run(self, name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Ask the model of a component; of a text encoder a prompt at a time, so that the server's cache knows each.

        Raises:
            ArtifactError: it failed, or is not loaded.
        """
        spec = self.manifest.component(name)
        model = _Model(name, [key for key, tensor in spec.writes.items() if tensor not in self._of_clicks])
        if name != "text_encoder":
            return run_component(spec, model, tensors)
        needed = {tensor: tensors[tensor] for tensor in spec.reads.values()}
        count = len(tensors["input_ids"])
        rows = [
            run_component(spec, model, {key: value[row : row + 1] for key, value in needed.items()}) for row in range(count)
        ]
        return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}

    def _asked(self, given: Mapping[str, np.ndarray]) -> Asked:
        ids, valid, manifest = given["input_ids"], given["attention_mask"], self.manifest
        count, length = ids.shape
        least = manifest.context_length if manifest.fixed_length else 1
        if not count or not least <= length <= manifest.context_length:
            raise refused(f"input_ids are prompts x {least} to {manifest.context_length} tokens, got {count} x {length}")
        if ids.min() < 0 or ids.max() >= manifest.vocab_size:
            raise refused(f"token ids are below {manifest.vocab_size}, got {ids.min()} to {ids.max()}")
        if valid.shape != ids.shape or not valid.any(axis=1).all():
            raise refused("attention_mask is True for the tokens of each prompt, at least one, and shaped as input_ids")
        missing = [name for name in _BOXES if name not in given]
        if missing and len(missing) < len(_BOXES):
            raise refused(f"{', '.join(_BOXES)} are given together, {', '.join(missing)} is missing")
        tensors = {"input_ids": ids, "attention_mask": valid}
        if missing:
            tensors["boxes"] = np.full((count, 1, 4), 0.5, dtype=np.float32)
            tensors["box_labels"] = np.ones((count, 1), dtype=np.int64)
            tensors["box_mask"] = np.ones((count, 1), dtype=bool)
        else:
            tensors |= {name: given[name] for name in _BOXES}
        most = manifest.component("prompt_encoder").ranges.get("boxes", (1, 1))[1]
        shape = tensors["boxes"].shape
        if shape[0] != count or not 1 <= shape[1] <= most or shape[2:] != (4,):
            raise refused(f"boxes are {count} prompts x 1 to {most} x 4, got {list(shape)}")
        if any(tensors[name].shape != shape[:2] for name in _BOXES[1:]):
            raise refused(f"box_labels and box_mask have a value for each of {shape[0]} x {shape[1]} boxes")
        if not np.isfinite(tensors["boxes"]).all() or not np.isin(tensors["box_labels"], (0, 1)).all():
            raise refused("boxes are finite fractions of the picture, box_labels are 1 or 0")
        thresholds = given.get("threshold", np.array([manifest.threshold], dtype=np.float32))
        if thresholds.shape not in ((1,), (count,)):
            raise refused(f"threshold has one value, or one for each of {count} prompts, got {len(thresholds)}")
        for value in thresholds:
            fraction(float(value), "a threshold")
        return Asked(tensors=tensors, thresholds=np.broadcast_to(thresholds, (count,)).astype(np.float32))


class _Model:
    """A component's model in the same server, as a runner of its file."""

    def __init__(self, name: str, outputs: list[str]) -> None:
        self.name, self.outputs = name, outputs

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import triton_python_backend_utils as pb_utils

        inputs = [pb_utils.Tensor(key, np.atleast_1d(value)) for key, value in arrays.items()]  # a request has no scalars
        cpu = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
        request = pb_utils.InferenceRequest(
            model_name=self.name, requested_output_names=self.outputs, inputs=inputs, preferred_memory=cpu
        )
        response = request.exec()
        if response.has_error():
            fact = response.error().message()
            raise ArtifactError(f"{self.name} failed ({fact})", remedy=_OLD_NUMPY if "got 0" in fact else "", step=Step.RUN)
        return {item.name(): item.as_numpy() for item in response.output_tensors()}


def _most(given: Mapping[str, np.ndarray]) -> int | None:
    value = given.get("max_detections")
    if value is None:
        return None
    if value.shape != (1,):
        raise SpecError(f"max_detections is one number, got {len(value)}", step=Step.RUN)
    return whole_number(int(value[0]), "max_detections")
