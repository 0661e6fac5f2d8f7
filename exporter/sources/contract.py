"""What a pipeline component is: a module with named inputs and outputs, and how its inputs are fed.

Six components take a picture and words to masks, a seventh a picture and clicks. Every source (Meta's ``Sam3Image``,
transformers' ``Sam3Model``) is split into the same, as far as it has them, so the runtime knows one contract. Tensors are
batch-first and masks True for padding, whatever the source uses.

| component | takes | gives |
|---|---|---|
| ``vision_encoder`` | ``image`` (images, 3, S, S), normalized | ``fpn_0``, ``fpn_1``, …, ``image_tokens``, ``image_pos`` |
| ``text_encoder`` | ``input_ids`` (prompts, length) | ``text_features``, ``text_mask`` |
| ``prompt_encoder`` | text, ``boxes``, ``box_labels``, ``box_mask``, one picture's tokens | ``prompt``, ``prompt_mask`` |
| ``fusion_encoder`` | tokens and prompt | ``encoded`` (prompts, tokens, C) |
| ``decoder`` | ``encoded`` and prompt | ``pred_boxes``, ``pred_logits``, ``presence_logit_dec``, ``queries`` |
| ``mask_head`` | ``queries``, ``encoded``, prompt, ``fpn_*`` | ``pred_masks`` |
| ``interactive_head`` | ``point_coords``, ``point_labels``, ``mask_input``, ``has_mask_input``, a picture's ``image_embed``, \
``high_res_feats_*`` | ``low_res_masks``, ``iou_predictions`` |

With an interactive head the vision encoder gives ``image_embed`` and ``high_res_feats_*`` too. A row of ``prompts`` is then one
object: ``point_coords`` (objects, points, 2) in pixels of the square picture, ``point_labels`` 1 for a point of the object, 0
for one outside, 2 and 3 for the corners of a box, -1 for none: the last row is one, as upstream's prompt encoder adds it.
Rows of ``PADDING`` fill an object up to as many as another has, and have no part in anything; there is one row at least.
``mask_input`` (objects, 1, h, w) holds logits of an earlier answer where ``has_mask_input``. Of the four masks the first is the
single one, upstream's choice by stability included, the others the three for a prompt that may mean several things.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sam3x.errors import ArtifactError, SourceError, Step
from sam3x.fusion.ambient import settled
from sam3x.fusion.encoder import FusionEncoder
from sam3x.fusion.shadow import holding
from sam3x.fusion.wide import wide_floats
from sam3x.sources.clicks import Clicks
from sam3x.sources.names import COMPONENTS, DETECTOR, INTERACTIVE_HEAD
from sam3x.spec import ExportSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """One input of a component.

    Attributes:
        name: of the graph input. source: the pipeline tensor that feeds it; the same name unless told otherwise.
        dims: meaning of each dimension: a name (``prompts``) is dynamic, None is whatever size the source has.
    """

    name: str
    dims: tuple[str | None, ...]
    source: str = ""

    @property
    def tensor(self) -> str:
        """The pipeline tensor that feeds this input."""
        return self.source or self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One exportable part of an image model.

    Attributes:
        name: one of ``sam3x.sources.names.COMPONENTS``.
        module: an adapter around the source's own code. ``forward`` takes the inputs in order, returns a tuple of outputs.
            A ``FusionEncoder`` is captured with its branches.
        inputs, outputs: names in graph order. A name of an output is a pipeline tensor.
        ranges: dynamic dimension → inclusive sizes.
        renamed: graph output → pipeline tensor, where they differ.
        constants: inputs that the pipeline itself feeds: runtime flags of the fusion encoder.
    """

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    ranges: Mapping[str, tuple[int, int]]
    renamed: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def scaled(self) -> bool:
        """Whether a difference is taken of the largest value of its output: of all but a fusion encoder, whose scale is one."""
        return not isinstance(self.module, FusionEncoder)

    def feed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This component's inputs out of the pipeline's tensors; those of one picture are repeated for every prompt."""
        tensors = {**tensors, **self.constants}
        prompts = max((len(tensors[p.tensor]) for p in self.inputs if p.dims[:1] == ("prompts",)), default=1)
        fed = {}
        for port in self.inputs:
            value = tensors[port.tensor]
            if port.dims[:1] == ("prompts",) and len(value) != prompts:
                value = value.expand(prompts, *value.shape[1:])
            fed[port.name] = value
        return fed

    def eager(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The source's own float32 result, graph output by graph output."""
        if isinstance(self.module, FusionEncoder):
            return self.module.eager(inputs)
        with settled():
            results = self.module(*(inputs[port.name] for port in self.inputs))
        return dict(zip(self.outputs, results, strict=True))

    def eager_double(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same in float64, with copies of the weights for as long as it takes."""
        doubled = {name: _wide(value) for name, value in inputs.items()}
        if isinstance(self.module, FusionEncoder):
            return self.module.eager(doubled)
        weights = {id(value): _wide(value) for value in (*self.module.parameters(), *self.module.buffers())}
        with settled(), wide_floats(), holding(self.module, weights):
            results = self.module(*(doubled[port.name] for port in self.inputs))
        return dict(zip(self.outputs, results, strict=True))

    def giving(self, outputs: Collection[str]) -> Component:
        """This component with some of its outputs."""
        kept = [index for index, name in enumerate(self.outputs) if name in outputs]
        names = tuple(self.outputs[index] for index in kept)
        return self if names == self.outputs else replace(self, module=_Some(self.module, kept), outputs=names)


class _Some(nn.Module):
    """``module`` with some of its outputs."""

    def __init__(self, module: nn.Module, kept: Sequence[int]) -> None:
        super().__init__()
        self.module, self.kept = module, tuple(kept)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.module(*inputs)
        return tuple(found[index] for index in self.kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A source split into components: one, or those of an image model.

    Attributes:
        components: in the order of ``sam3x.sources.names.COMPONENTS``.
        origin: one readable phrase, kept in the manifest. weights_sha256: see ``sam3x.sources.encoder.weights_hash``.
        notes: what a user should know.
        spec: the request as the source's code wants it; None: as it was.
    """

    components: tuple[Component, ...]
    origin: str
    weights_sha256: str
    notes: tuple[str, ...] = ()
    spec: ExportSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageModel(Model):
    """An image model, and what the runtime must know beside its components.

    Attributes:
        image_size: side of the square picture. mean, std: of its normalization, as fractions of white.
        context_length: most tokens of a text. fixed_length: whether every text is padded to it.
        pad_id: token that fills a text up. box_text: the words that stand for "only boxes".
        source: whose model it is, ``sam3`` or ``transformers``.
        threshold, mask_interpolation: its post-processing, see ``PipelineManifest``.
        clicks: that of its interactive head; None: it has none.
        tokenizer: the source's own vocabulary. unescape_html: whether its tokenizer reads ``&amp;`` as ``&``.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    context_length: int
    fixed_length: bool
    vocab_size: int
    pad_id: int
    box_text: str
    source: str = "sam3"
    tokenizer: Path | None = None
    unescape_html: bool = True
    threshold: float = 0.5
    mask_interpolation: Literal["logits", "probabilities"] = "logits"
    clicks: Clicks | None = None

    def narrowed(self, chosen: Collection[str]) -> ImageModel:
        """The model for an export of ``chosen``: where those are of one head, the vision encoder gives what that head takes.

        Raises:
            SourceError: ``chosen`` are some of a model's components, and it has not all of them.
        """
        names = [item.name for item in self.components]
        absent = [name for name in chosen if name not in names]
        if absent and set(chosen) != set(COMPONENTS):
            raise SourceError(f"{self.origin} has no {' and no '.join(absent)}", remedy="Leave it out of --components.")
        heads = [head for head in (set(DETECTOR[1:]), {INTERACTIVE_HEAD}) if head & set(chosen)]
        if len(heads) != 1:
            return self
        kept = [item for item in self.components if item.name in heads[0] or item.name == DETECTOR[0]]
        read = {port.tensor for item in kept for port in item.inputs}
        kept = [item.giving(read) if item.name == DETECTOR[0] else item for item in kept]
        return replace(self, components=tuple(kept), clicks=self.clicks if INTERACTIVE_HEAD in heads[0] else None)

    def runtime(self) -> dict[str, Any]:
        """What the runtime must know beside the components, as fields of the manifest."""
        shared = {item.name for item in fields(Model)}
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in shared}


def _wide(value: Tensor) -> Tensor:
    if value.is_complex():
        return value.detach().to(torch.complex128)
    return value.detach().double() if value.is_floating_point() else value


Walk = dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]
"""Component name → its inputs and its outputs."""


def walk(
    components: Sequence[Component],
    given: Mapping[str, Tensor],
    select: Callable[[Tensor], Tensor] | None = None,
    vision: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None,
) -> Walk:
    """Run the eager detector, a component after another, on the pipeline's outer inputs, keeping what went in and out of each.

    Args:
        given: ``image``, ``input_ids``, ``boxes``, ``box_labels``, ``box_mask``.
        select: which of the decoder's queries the mask head gets; all by default.
        vision: what an earlier walk has for the vision encoder, to be used again.
    """
    tensors, trace = dict(given), {}
    for component in (item for item in components if item.name != INTERACTIVE_HEAD):
        if component.name == "vision_encoder" and vision is not None:
            inputs, outputs = vision
        else:
            inputs = component.feed(tensors)
            outputs = component.eager(inputs)
        trace[component.name] = (inputs, outputs)
        for name, value in outputs.items():
            value = value[:1] if component.name == "vision_encoder" else value  # the rest looks at one picture
            tensors[component.renamed.get(name, name)] = select(value) if select and name == "queries" else value
    return trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The source of an export that is to be verified or measured again: ``folder``, and its manifest's origin and weights."""

    folder: str
    origin: str
    weights_sha256: str

    def check(self, *, origin: str | None = None, weights_sha256: str | None = None) -> None:
        """Refuse another source as soon as one of the two is known.

        Raises:
            ArtifactError: it differs.
        """
        if origin not in (None, self.origin) or weights_sha256 not in (None, self.weights_sha256):
            raise ArtifactError(
                f"{self.folder} was exported from other weights ({self.origin})",
                remedy="Name the source it came from: --checkpoint or --module.",
                step=Step.REVERIFY,
            )


class SourceFactory(Protocol):
    """Split a source into components once the spec of its fusion encoder is known."""

    def __call__(self, spec: ExportSpec, expected: Expected | None = None) -> Model:
        """Load the source and split it; one that is not ``expected`` is refused before that."""


class ImageSourceFactory(Protocol):
    """A ``SourceFactory`` of an image model."""

    def __call__(self, spec: ExportSpec, expected: Expected | None = None) -> ImageModel:
        """As ``SourceFactory``."""
