"""From a picture's features and prompts to detections, whoever runs the components: this process, or a server."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3x.errors import ArtifactError, Step
from sam3x.runtime.manifest import SEGMENTER, PipelineManifest
from sam3x.runtime.pictures import sigmoid
from sam3x.runtime.prompts import Limits, Prompt, boxes_to_pixels, read_prompts
from sam3x.runtime.result import Result
from sam3x.runtime.text import Tokenizer, pad

if TYPE_CHECKING:
    from PIL import Image

Run = Callable[[str, Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""A component's name and the pipeline's tensors → its outputs, under the names of pipeline tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Some prompts as the model takes them.

    Attributes:
        tensors: ``input_ids`` (prompts, length) int64, ``attention_mask`` of the same shape, bool, True for tokens; ``boxes``
            (prompts, boxes, 4) float32, cx, cy, w, h as fractions; ``box_labels`` (prompts, boxes) int64; ``box_mask`` of the
            same shape, bool, True for padding.
        thresholds: (prompts,) float32, what detections score above.
    """

    tensors: dict[str, np.ndarray]
    thresholds: np.ndarray

    def __len__(self) -> int:
        return len(self.thresholds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one prompt found: scores (N,), boxes (N, 4) as fractions, mask logits (N, h, w)."""

    scores: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray


class PromptReader:
    """Prompts as people give them, read by the rules and the vocabulary of an exported pipeline."""

    def __init__(self, folder: Path, manifest: PipelineManifest) -> None:
        self.folder, self.manifest = folder, manifest

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Words to ids. Raises ``ArtifactError`` where the pipeline was exported without a vocabulary."""
        name = self.manifest.tokenizer
        if name is None:
            raise ArtifactError(
                f"{self.folder} was exported without a tokenizer, so words cannot be read",
                remedy=(
                    "Export again with --tokenizer FILE (bpe_simple_vocab_16e6.txt.gz or a tokenizer.json), or give token ids."
                ),
                step=Step.RUN,
            )
        return Tokenizer(self.folder / name, self.manifest.context_length, unescape_html=self.manifest.unescape_html)

    def read(self, text: Any = None, boxes: Any = None, labels: Any = None, threshold: Any = None) -> tuple[Prompt, ...]:
        """The arguments of ``Segmenter.segment`` and what it raises about them."""
        part = self.manifest.component(SEGMENTER if self.manifest.fused else "prompt_encoder")
        limits = Limits(
            context_length=self.manifest.context_length,
            vocab_size=self.manifest.vocab_size,
            boxes=part.ranges.get("boxes", (1, 1))[1],
        )
        return read_prompts(
            text,
            boxes,
            labels,
            threshold,
            default_threshold=self.manifest.threshold,
            limits=limits,
            box_text=self.manifest.box_text,
            tokenize=lambda words: self.tokenizer(words),
        )

    def asked(self, prompts: Sequence[Prompt], boxes: Sequence[np.ndarray]) -> Asked:
        """``prompts`` as the model takes them; ``boxes``: theirs, (N, 4) as fractions."""
        count, longest = len(prompts), max([1, *(len(item) for item in boxes)])
        manifest = self.manifest
        ids = pad([item.ids for item in prompts], manifest.context_length, manifest.pad_id, fixed_length=manifest.fixed_length)
        tensors = {
            "input_ids": ids,
            "attention_mask": np.arange(ids.shape[1])[None] < np.array([len(item.ids) for item in prompts])[:, None],
            "boxes": np.full((count, longest, 4), 0.5, dtype=np.float32),
            "box_labels": np.ones((count, longest), dtype=np.int64),
            "box_mask": np.ones((count, longest), dtype=bool),  # True: padding, as everywhere
        }
        for row, (item, own) in enumerate(zip(prompts, boxes, strict=True)):
            used = len(own)
            tensors["boxes"][row, :used], tensors["box_labels"][row, :used] = own, item.labels
            tensors["box_mask"][row, :used] = False
        return Asked(tensors=tensors, thresholds=np.array([item.threshold for item in prompts], dtype=np.float32))


def detect(
    run: Run, manifest: PipelineManifest, features: Mapping[str, np.ndarray], asked: Asked, most: int | None
) -> Iterator[Found]:
    """What each prompt found, the ``most`` that score highest; ``features``: of the vision encoder, of one picture."""
    tensors = {**features, **asked.tensors}
    tensors.update(run("text_encoder", tensors))
    if manifest.fused:
        found = run(SEGMENTER, {**tensors, "threshold": asked.thresholds.min(keepdims=True)})
        for row in range(len(asked)):
            rows = np.flatnonzero(found["found_prompts"] == row)
            keep = rows[_best(found["found_scores"][rows], asked.thresholds[row], most)]
            yield Found(scores=found["found_scores"][keep], boxes=found["found_boxes"][keep], masks=found["found_masks"][keep])
        return
    for name in ("prompt_encoder", "fusion_encoder", "decoder"):
        tensors.update(run(name, tensors))
    scores = sigmoid(tensors["pred_logits"]) * sigmoid(tensors["presence_logit_dec"])
    for row in range(len(asked)):
        keep = _best(scores[row], asked.thresholds[row], most)
        masks = np.zeros((0, 1, 1), dtype=np.float32)
        if len(keep):  # the mask head sees what is wanted alone
            given = {name: tensors[name][row : row + 1] for name in ("encoded", "prompt", "prompt_mask")}
            given["queries"] = np.ascontiguousarray(tensors["queries"][row : row + 1, keep])
            masks = run("mask_head", {**features, **given})["pred_masks"][0]
        yield Found(scores=scores[row, keep], boxes=tensors["pred_boxes"][row, keep], masks=masks)


def result_of(found: Sequence[Found], prompts: Sequence[Prompt], picture: Image.Image, manifest: PipelineManifest) -> Result:
    """What each of ``prompts`` found in ``picture``, as one result."""
    width, height = picture.size
    logits = [item.masks for item in found if len(item.masks)]
    masks = np.concatenate(logits) if logits else np.zeros((0, 1, 1), dtype=np.float32)
    of_logits = manifest.mask_interpolation == "logits"
    return Result(
        small_masks=masks if of_logits else sigmoid(masks),
        border=0.0 if of_logits else 0.5,
        boxes=boxes_to_pixels(np.concatenate([item.boxes for item in found]), height, width),
        scores=np.concatenate([item.scores for item in found]),
        prompt=np.repeat(np.arange(len(found)), [len(item.scores) for item in found]),
        prompts=tuple(item.name for item in prompts),
        picture=picture,
    )


def _best(scores: np.ndarray, threshold: np.floating, most: int | None) -> np.ndarray:
    """Indices, in order, of the scores above ``threshold``, or of the ``most`` highest of those."""
    keep = np.flatnonzero(scores > threshold)
    if most is not None and len(keep) > most:
        keep = np.sort(keep[np.argsort(-scores[keep], kind="stable")[:most]])
    return keep
