"""``manifest.json``: what an artifact is, where it came from, and the proof that it is right."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, Field, ValidationError

from sam3x.errors import ArtifactError, Step
from sam3x.sources.clicks import Clicks
from sam3x.sources.names import FUSION_ENCODER
from sam3x.verify.record import Record, TensorSpec, VerificationRecord

SCHEMA_VERSION = 4
MANIFEST = "manifest.json"
SEGMENTER = "segmenter"
"""The component that ``--fuse`` joins from those that run for every prompt."""

_LARGEST = 1 << 26  # bytes; a manifest is some hundred thousand at most


class MatchFailureRecord(Record):
    """Where a pass nearly matched, and why it refused."""

    node: str
    reason: str


class PassRecordModel(Record):
    """One pass of the export, as ``sam3x.passes.pipeline.PassRecord``."""

    name: str
    modified: bool
    rewrites: int
    nodes_before: int
    nodes_after: int
    seconds: float
    match_failures: tuple[MatchFailureRecord, ...] = Field(
        default=(), validation_alias=AliasChoices("match_failures", "missed")
    )
    max_change: float | None = None

    @classmethod
    def of(cls, record: Any) -> PassRecordModel:
        """From a ``sam3x.passes.pipeline.PassRecord``."""
        failures = tuple(MatchFailureRecord(node=item.node, reason=item.reason) for item in record.match_failures)
        names = ("name", "modified", "rewrites", "nodes_before", "nodes_after", "max_change")
        return cls(**{name: getattr(record, name) for name in names}, seconds=round(record.seconds, 4), match_failures=failures)


class ComponentSpec(Record):
    """One component file.

    Attributes:
        reads: graph input → the pipeline tensor that feeds it. writes: graph output → pipeline tensor.
        constants: inputs that always get the same value (runtime flags of the fusion encoder, as the source runs it).
        ranges: dynamic dimension → inclusive sizes. A dimension of size 1 that reads a picture's tensor takes one picture.
        metadata: what the target tells of its file (delegates, …). metrics: seconds of each step.
        notes: what a user should know.
    """

    name: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    reads: dict[str, str]
    writes: dict[str, str]
    constants: dict[str, bool | list[bool]] = Field(default_factory=dict)
    ranges: dict[str, tuple[int, int]] = Field(default_factory=dict)
    passes: tuple[PassRecordModel, ...] = ()
    verification: tuple[VerificationRecord, ...] = ()
    metadata: dict[str, Any] = Field(default_factory=dict, validation_alias=AliasChoices("metadata", "facts"))
    metrics: dict[str, float] = Field(default_factory=dict, validation_alias=AliasChoices("metrics", "figures"))
    notes: tuple[str, ...] = ()


class PromptQuality(Record):
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


class Quality(Record):
    """What a precision below fp32 does to a pipeline's answers: each prompt's figures, their mean, their worst."""

    precision: str
    picture: str
    prompts: tuple[PromptQuality, ...]
    mean_iou: float
    min_iou: float
    largest_box_difference: float
    largest_score_difference: float


class Manifest(Record):
    """Everything ``sam3x inspect`` shows: of a fusion encoder by itself, which is one component, or of an image model.

    Attributes:
        components: in the order in which they run.
        spec, target_options: the request.
        origin: where the weights came from. weights_sha256: see ``sam3x.sources.encoder.weights_hash``.
        verified: whether every component was compared with eager; ``verified_reason`` says why not.
        files: relative names, nested ones too (``1/model.plan``), each with its sha256.
        manifest_sha256: of everything else in here (see ``sealed``): nothing is changed unnoticed. It is no signature.
    """

    schema_version: int = SCHEMA_VERSION
    kind: Literal["encoder", "pipeline"] = "encoder"
    target: str
    opset: int | None = None
    components: tuple[ComponentSpec, ...]
    spec: dict[str, Any] = Field(default_factory=dict)
    target_options: dict[str, Any] = Field(default_factory=dict)
    origin: str
    weights_sha256: str
    versions: dict[str, str]
    verified: bool = False
    verified_reason: str | None = None
    files: dict[str, str]
    metrics: dict[str, float] = Field(default_factory=dict, validation_alias=AliasChoices("metrics", "figures"))
    notes: tuple[str, ...] = ()
    manifest_sha256: str = ""

    @property
    def encoder(self) -> ComponentSpec:
        """The only component of an encoder by itself."""
        return self.components[0]

    @property
    def interface(self) -> str:
        """Signature of the fusion encoder's graph, ``tokens`` or ``feature_maps``."""
        return str(self.spec.get("interface", "tokens"))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Of the encoder, in graph order."""
        return self.encoder.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Of the encoder, in graph order."""
        return self.encoder.outputs

    @property
    def input_names(self) -> tuple[str, ...]:
        """Of the encoder, in graph order."""
        return tuple(item.name for item in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Of the encoder, in graph order."""
        return tuple(item.name for item in self.outputs)

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """Inclusive sizes of the encoder's named dimensions."""
        return self.encoder.ranges

    @property
    def metadata(self) -> dict[str, Any]:
        """What the target tells of the encoder's file."""
        return self.encoder.metadata

    @property
    def passes(self) -> tuple[PassRecordModel, ...]:
        """Of every component, in turn."""
        return tuple(record for item in self.components for record in item.passes)

    @property
    def verification(self) -> tuple[VerificationRecord, ...]:
        """Of every component, in turn."""
        return tuple(record for item in self.components for record in item.verification)


class PipelineManifest(Manifest):
    """That of an image model, with all that ``sam3x.runtime`` must know.

    Attributes:
        image_size: side of the square picture the vision encoder takes. mean, std: of its normalization, fractions of white.
        context_length: most tokens of a text, begin and end included. fixed_length: whether a text must be that long.
        pad_id: what fills a text up. box_text: what the text encoder is given when there are only boxes.
        tokenizer: file in the format of Hugging Face's tokenizers; None: ids must be given.
        unescape_html: whether ``&amp;`` in a text is read as ``&``, as upstream's tokenizer does.
        threshold: what detections score above by default. mask_interpolation: what is stretched to the picture's size.
        clicks: how the interactive head's logits become masks; None: the pipeline has none.
        quality: masks, boxes and scores against eager in fp32, of a whole pipeline with rounded weights that was verified.
    """

    kind: Literal["encoder", "pipeline"] = "pipeline"
    source: str
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
    clicks: Clicks | None = None
    quality: Quality | None = None

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
        fact = f"the pipeline was exported without its {name}: it has {', '.join(item.name for item in self.components)}"
        raise ArtifactError(fact, remedy="Export a source that has it, whole: leave --components out.", step=Step.RUN)


def sealed(manifest: BaseModel) -> str:
    """The text of ``manifest.json``, with a hash over everything else in it."""
    values = json.loads(manifest.model_dump_json())
    return json.dumps({**values, "manifest_sha256": _seal_of(values)}, indent=2) + "\n"


def _seal_of(values: dict[str, Any]) -> str:
    rest = {name: value for name, value in values.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path, command: str = "sam3x export") -> Manifest:
    """The manifest in ``folder``, also one that an earlier sam3x wrote. The files it names are not looked at.

    Args:
        command: what writes such a manifest, for the advice of an error; a pipeline's says so itself.

    Raises:
        ArtifactError: none, of another schema, no manifest, or changed after the export.
    """
    path = folder / MANIFEST
    try:
        if path.exists() and not path.is_file():
            raise ArtifactError(f"{path} is no regular file", remedy=_again(folder, command))
        if path.stat().st_size > _LARGEST:
            raise ArtifactError(f"{path} is too large for a manifest", remedy=_again(folder, command))
        values = json.loads(path.read_bytes())
        seal = _seal_of(values) if isinstance(values, dict) else None
    except OSError as error:
        remedy = "Check its permissions." if isinstance(error, PermissionError) else f"Export first: {command} -o {folder}"
        raise ArtifactError(f"{path} cannot be read ({error.strerror})", remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise _no_manifest(path, str(error)) from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise _no_manifest(path, "it tells no schema_version")
    pipeline = values.get("kind") == "pipeline"
    remedy = _again(folder, "sam3x export --pipeline" if pipeline else command)
    if version not in (2, 3, SCHEMA_VERSION):
        fact = f"{path} has manifest schema {version}, this sam3x reads {SCHEMA_VERSION}"
        raise ArtifactError(fact, remedy=remedy)
    if values.get("manifest_sha256") != seal:
        raise ArtifactError(f"{path} was changed after the export (its own sha256 differs)", remedy=remedy)
    try:
        values = values if pipeline or version > 2 else _of_one_component(values)
        values = values if version == SCHEMA_VERSION else _stored(values)
        return (PipelineManifest if pipeline else Manifest).model_validate_json(json.dumps(values))
    except (ValidationError, LookupError, TypeError, AttributeError) as error:
        raise _no_manifest(path, str(error).partition("\n")[0]) from error


def _of_one_component(values: dict[str, Any]) -> dict[str, Any]:
    """Schema 2 had the fields of an encoder by itself beside those of the export."""
    names = ("inputs", "outputs", "ranges", "passes", "verification", "facts")
    files = [name for name in values["files"] if Path(name).suffix not in (".data", ".bpte", ".pbtxt")]
    component = {
        **{name: values[name] for name in names},
        "name": FUSION_ENCODER,
        "file": files[0],
        "reads": {item["name"]: item["name"] for item in values["inputs"]},
        "writes": {item["name"]: item["name"] for item in values["outputs"]},
    }
    kept = {*Manifest.model_fields, "figures"}  # read as metrics
    return {**{name: value for name, value in values.items() if name in kept}, "components": [component]}


def _stored(values: dict[str, Any]) -> dict[str, Any]:
    """Up to schema 3 ``precision`` of ONNX was that of the stored weights alone, which is ``weights`` now."""
    options = values["target_options"]
    if values["target"] != "onnx" or "precision" not in options:
        return values
    return {**values, "target_options": {**options, "precision": "fp32", "weights": options["precision"]}}


def _again(folder: Path, command: str) -> str:
    return f"Export again: {command} -o {folder}"


def _no_manifest(path: Path, fact: str) -> ArtifactError:
    """An export leaves such a file alone, so exporting again is no way out."""
    remedy = "Move it away, then export again."
    return ArtifactError(f"{path} is no sam3x manifest ({fact})", remedy=remedy)


def names_written(folder: Path) -> set[str]:
    """What an export wrote into ``folder``, its manifest too, whatever was changed since; nothing where sam3x wrote none."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_bytes()) if path.stat().st_size <= _LARGEST else None
    except (OSError, ValueError, RecursionError):
        return set()
    if not isinstance(values, dict) or not isinstance(values.get("manifest_sha256"), str):
        return set()
    return {MANIFEST, *(values["files"] if isinstance(values.get("files"), dict) else ())}


def is_pipeline(folder: str | Path) -> bool:
    """Whether ``folder`` holds an image model; False where no manifest can be read."""
    try:
        return isinstance(read_manifest(Path(folder)), PipelineManifest)
    except ArtifactError:
        return False
