"""``Client``: ``Segmenter.segment`` by a server: pictures and words are read here, the model runs in Triton."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sam3x.artifact.manifest import PipelineManifest, read_manifest
from sam3x.errors import ArtifactError, SpecError, Step, TargetUnavailableError
from sam3x.runtime.detect import Found, PromptReader, result_of
from sam3x.runtime.pictures import open_picture
from sam3x.runtime.prompts import boxes_to_fractions, whole_number
from sam3x.runtime.resize import resize_picture
from sam3x.runtime.result import Result

INSTALL = 'Install it: pip install "sam3x[client]"'
_URLS = {"http": "localhost:8000", "grpc": "localhost:8001"}
_TYPES = {"uint8": "UINT8", "int64": "INT64", "bool": "BOOL", "float32": "FP32"}


class Client:
    """A pipeline in a server: what ``sam3x export --pipeline --layout triton`` wrote, started by ``tritonserver``.

    A connection for one thread; ``with Client(folder) as client:`` or ``close()`` ends it.

    Args:
        folder: ``manifest.json`` and ``tokenizer.json`` of the export; the other files need not be here.
        url: host and port; None: this machine, 8000 for HTTP, 8001 for gRPC.
        protocol: ``"http"`` or ``"grpc"``.
        model: its name in the repository.
        timeout: seconds that an answer may take.
        max_pixels: see ``Segmenter``.

    Raises:
        ArtifactError: ``folder`` has no manifest of a pipeline.
        SpecError: no such protocol.
        TargetUnavailableError: tritonclient is not installed, with the command that installs it.
    """

    def __init__(
        self,
        folder: str | Path,
        url: str | None = None,
        *,
        protocol: Literal["http", "grpc"] = "http",
        model: str = "sam3",
        timeout: float = 300.0,
        max_pixels: int | None = None,
    ) -> None:
        if protocol not in _URLS:
            raise SpecError(f"protocol is http or grpc, got {protocol!r}", step=Step.LOAD)
        manifest = read_manifest(Path(folder), "sam3x export --pipeline --layout triton")
        if not isinstance(manifest, PipelineManifest):
            raise ArtifactError(f"{folder} holds no pipeline, but a single encoder", step=Step.LOAD)
        self.manifest, self.model, self.max_pixels = manifest, model, max_pixels
        self.url = url or _URLS[protocol]
        self._reader = PromptReader(Path(folder), manifest)
        try:
            self._package = importlib.import_module(f"tritonclient.{protocol}")
        except (ImportError, RuntimeError) as error:  # tritonclient's own word for a missing extra is a RuntimeError
            raise TargetUnavailableError("asking a server needs tritonclient", remedy=INSTALL, step=Step.LOAD) from error
        own = {"connection_timeout": timeout, "network_timeout": timeout} if protocol == "http" else {}
        self._client = self._package.InferenceServerClient(self.url, **own)
        self._limits = {"client_timeout": timeout} if protocol == "grpc" else {}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def segment(
        self,
        image: Any,
        text: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | None = None,
        boxes: Any = None,
        labels: Any = None,
        threshold: float | Sequence[float] | None = None,
        max_detections: int | None = None,
    ) -> Result:
        """Everything that any of the prompts describes: the arguments of ``Segmenter.segment``, and its result.

        Raises:
            SpecError: as ``Segmenter.segment``. ArtifactError: the server cannot be reached, or says what went wrong.
        """
        prompts = self._reader.read(text, boxes, labels, threshold)
        most = None if max_detections is None else whole_number(max_detections, "max_detections")
        picture = open_picture(image, self.max_pixels)
        width, height = picture.size
        asked = self._reader.asked(prompts, [boxes_to_fractions(item.boxes, height, width) for item in prompts])
        size = self.manifest.image_size
        tensors = {"image": resize_picture(np.asarray(picture), size, size), **asked.tensors, "threshold": asked.thresholds}
        if most is not None:
            tensors["max_detections"] = np.array([most])
        found = self._infer(tensors)
        rows = [np.flatnonzero(found["found_prompts"] == index) for index in range(len(prompts))]
        answers = [
            Found(scores=found["found_scores"][own], boxes=found["found_boxes"][own], masks=found["found_masks"][own])
            for own in rows
        ]
        return result_of(answers, prompts, picture, self.manifest)

    def _infer(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        from tritonclient.utils import InferenceServerException

        inputs = []
        for name, value in tensors.items():
            item = self._package.InferInput(name, list(value.shape), _TYPES[str(value.dtype)])
            item.set_data_from_numpy(np.ascontiguousarray(value))
            inputs.append(item)
        try:
            result = self._client.infer(self.model, inputs, **self._limits)
        except (InferenceServerException, OSError) as error:  # what the server says, or no server
            fact = str(error).strip().partition("\n")[0].rstrip(".")
            raise ArtifactError(f"{self.url} gives no answer ({fact})", step=Step.RUN) from error
        names = ("found_prompts", "found_scores", "found_boxes", "found_masks")
        return {name: result.as_numpy(name) for name in names}
