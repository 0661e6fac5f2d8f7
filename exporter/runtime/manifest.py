"""``manifest.json`` of a pipeline: the component files, how they connect, and what pre- and post-processing must know."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sam3x.artifact.artifact import check_files
from sam3x.artifact.journal import recover
from sam3x.artifact.manifest import SCHEMA_VERSION, PassRecordModel, TensorSpec, VerificationRecord, read_values, validated
from sam3x.errors import ArtifactError, Step

SEGMENTER = "segmenter"
"""The component that ``--fuse`` joins from those that run for every prompt."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class ComponentSpec(_Record):
    """One component file.

    Attributes:
        reads: graph input → the pipeline tensor that feeds it. writes: graph output → pipeline tensor.
        constants: inputs that always get the same value (runtime flags of the fusion encoder, as the source runs it).
        ranges: dynamic dimension → inclusive sizes. A dimension of size 1 that reads a picture's tensor takes one picture.
    """

    name: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    reads: dict[str, str]
    writes: dict[str, str]
    constants: dict[str, bool | list[bool]] = {}
    ranges: dict[str, tuple[int, int]] = {}
    passes: tuple[PassRecordModel, ...] = ()
    verification: tuple[VerificationRecord, ...] = ()
    facts: dict[str, Any] = {}
    figures: dict[str, float] = {}


class PromptQuality(_Record):
    """One prompt through the files against the eager source in fp32, at the queries that eager scores highest.

    ``mean_iou`` and ``min_iou`` are of their masks at the mask head's size, intersection over union; boxes are fractions of the
    picture, scores 0 to 1.
    """

    prompt: str
    queries: int
    mean_iou: float
    min_iou: float
    largest_box_difference: float
    largest_score_difference: float


class Quality(_Record):
    """What a precision below fp32 does to a pipeline's answers: each prompt's figures, their mean, their worst."""

    precision: str
    picture: str
    prompts: tuple[PromptQuality, ...]
    mean_iou: float
    min_iou: float
    largest_box_difference: float
    largest_score_difference: float


class PipelineManifest(_Record):
    """Everything ``sam3x.runtime`` and ``sam3x inspect`` need.

    Attributes:
        components: in the order in which they run.
        image_size: side of the square picture the vision encoder takes. mean, std: of its normalization, fractions of white.
        context_length: most tokens of a text, begin and end included. fixed_length: whether a text must be that long.
        pad_id: what fills a text up. box_text: what the text encoder is given when there are only boxes.
        tokenizer: file in the format of Hugging Face's tokenizers; None: ids must be given.
        unescape_html: whether ``&amp;`` in a text is read as ``&``, as upstream's tokenizer does.
        threshold: what detections score above by default. mask_interpolation: what is stretched to the picture's size.
        quality: masks, boxes and scores against eager in fp32, of a whole pipeline with rounded weights that was verified.
    """

    schema_version: int = SCHEMA_VERSION
    kind: Literal["pipeline"] = "pipeline"
    target: str
    opset: int | None = None
    source: str
    components: tuple[ComponentSpec, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    context_length: int
    fixed_length: bool
    vocab_size: int
    pad_id: int
    box_text: str
    tokenizer: str | None = None
    unescape_html: bool = True
    threshold: float = 0.5
    mask_interpolation: Literal["logits", "probabilities"] = "logits"
    spec: dict[str, Any] = {}
    target_options: dict[str, Any] = {}
    origin: str
    weights_sha256: str
    versions: dict[str, str]
    verified: bool = False
    verified_reason: str | None = None
    quality: Quality | None = None
    files: dict[str, str]
    figures: dict[str, float] = {}
    notes: tuple[str, ...] = ()
    manifest_sha256: str = ""

    @property
    def fused(self) -> bool:
        """Whether one file goes from text features and boxes to the masks of what was found."""
        return any(item.name == SEGMENTER for item in self.components)

    def component(self, name: str) -> ComponentSpec:
        """The component of that name.

        Raises:
            ArtifactError: it was left out of the export.
        """
        for item in self.components:
            if item.name == name:
                return item
        raise ArtifactError(
            f"the pipeline was exported without its {name}", remedy="Export it whole: leave --components out.", step=Step.RUN
        )


def is_pipeline(folder: str | Path) -> bool:
    """Whether the manifest in ``folder`` says it is a pipeline's; False where there is none to read."""
    try:
        return read_values(Path(folder)).get("kind") == "pipeline"
    except ArtifactError:
        return False


def load_manifest(folder: str | Path, *, check: bool = True) -> PipelineManifest:
    """The manifest of an exported pipeline, every file compared with its sha256.

    Args:
        check: False skips the hashes, which takes seconds for gigabytes.

    Raises:
        ArtifactError: no pipeline, another schema, a missing or edited file, a name outside the folder.
    """
    root = Path(folder)
    recover(root)
    values = read_values(root, "sam3x export --pipeline")
    if values.get("kind") != "pipeline":
        raise ArtifactError(
            f"{root} holds no pipeline, but a single encoder", remedy=f"Export one: sam3x export --pipeline -o {root}"
        )
    manifest = validated(PipelineManifest, values, root)
    named = {item.file for item in manifest.components} | ({manifest.tokenizer} if manifest.tokenizer else set())
    if not named <= set(manifest.files):
        raise ArtifactError(
            f"{root} names files without a sha256: {sorted(named - set(manifest.files))}", remedy="Export again."
        )
    check_files(root, manifest.files, hashes=check)
    return manifest
