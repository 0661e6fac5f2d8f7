"""``--pipeline --layout triton``: beside the component models the one that a client asks, in Triton's Python backend."""

from __future__ import annotations

from pathlib import Path

from sam3x.artifact.manifest import MANIFEST, PipelineManifest, sealed
from sam3x.sources.names import DETECTOR

MODEL = "sam3"
"""Name of the model that a client asks."""

_CODE = '''"""Written by sam3x: the pipeline of this repository, for Triton's Python backend. See docs/serving.md."""

try:
    from sam3x.runtime.server import PipelineModel
except ModuleNotFoundError as error:
    raise ImportError(f'this model needs {error.name}. Install it for the server: pip install sam3x') from error


class TritonPythonModel(PipelineModel):
    """A picture, token ids and boxes in; masks, boxes and scores out."""
'''

_OPTIONAL = {
    "boxes": ("FP32", [-1, -1, 4]),
    "box_labels": ("INT64", [-1, -1]),
    "box_mask": ("BOOL", [-1, -1]),
    "threshold": ("FP32", [-1]),
    "max_detections": ("INT64", [1]),
}
_OUTPUTS = {
    "found_prompts": ("INT64", [-1]),
    "found_scores": ("FP32", [-1]),
    "found_boxes": ("FP32", [-1, 4]),
    "found_masks": ("FP32", [-1, -1, -1]),
}


def write_model(repository: Path, manifest: PipelineManifest) -> None:
    """Write ``sam3/config.pbtxt``, ``sam3/1/model.py`` and the manifest that it reads, of a pipeline that finds something.

    Of one that was exported without some component of the detector nothing is written: its models stand alone.
    """
    if not {item.name for item in manifest.components} >= set(DETECTOR):
        return
    folder = repository / MODEL / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(_CODE)
    components = tuple(item.model_copy(update={"passes": (), "verification": ()}) for item in manifest.components)
    (folder / MANIFEST).write_text(sealed(manifest.model_copy(update={"components": components})))
    (repository / MODEL / "config.pbtxt").write_text(config_text(manifest))


def config_text(manifest: PipelineManifest) -> str:
    """``config.pbtxt`` of the pipeline's model: no batching, as a request's prompts are its batch."""
    size, length = manifest.image_size, manifest.context_length if manifest.fixed_length else -1
    inputs = {
        "image": ("UINT8", [size, size, 3]),
        "input_ids": ("INT64", [-1, length]),
        "attention_mask": ("BOOL", [-1, length]),
    }
    given = [_tensor(name, *item) for name, item in inputs.items()]
    given += [_tensor(name, *item, ", optional: true") for name, item in _OPTIONAL.items()]
    results = [_tensor(name, *item) for name, item in _OUTPUTS.items()]
    between = ",\n"
    return (
        f'name: "{MODEL}"\nbackend: "python"\nmax_batch_size: 0\n'
        f"input [\n{between.join(given)}\n]\noutput [\n{between.join(results)}\n]\n"
        "version_policy { latest { num_versions: 1 } }\ninstance_group { count: 1, kind: KIND_CPU }\n"
    )


def _tensor(name: str, kind: str, dims: list[int], more: str = "") -> str:
    return f'  {{ name: "{name}", data_type: TYPE_{kind}, dims: [ {", ".join(map(str, dims))} ]{more} }}'
