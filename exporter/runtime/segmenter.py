"""``Segmenter``: an exported pipeline behind two calls, ``encode`` a picture and ``segment`` it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3x.errors import ArtifactError, SpecError, Step
from sam3x.runtime.components import Components
from sam3x.runtime.manifest import SEGMENTER, load_manifest
from sam3x.runtime.pictures import boxes_to_fractions, boxes_to_pixels, open_picture, sigmoid, to_tensor
from sam3x.runtime.resize import resize_bilinear
from sam3x.runtime.result import Result
from sam3x.runtime.text import Tokenizer, pad

if TYPE_CHECKING:
    from PIL import Image

Boxes = Sequence[Sequence[float]]
"""Boxes of x0, y0, x1, y1 in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedImage:
    """A picture and what the vision encoder made of it; use it for as many prompts as you like."""

    picture: Image.Image
    tensors: dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """One question to the model: token ids, and boxes as fractions with True for what is wanted."""

    name: str
    ids: Sequence[int]
    boxes: np.ndarray
    labels: np.ndarray


class Segmenter:
    """An exported pipeline, opened once. Component files are loaded when they are first needed.

    Args:
        folder: what ``sam3x export --pipeline`` wrote.
        check: compare every file with its sha256 first.
        batch: prompts that go through the model together; memory grows with it.

    Raises:
        ArtifactError: ``folder`` is no pipeline, or a file was changed.
        TargetUnavailableError: a package is missing, with the command that installs it.
    """

    def __init__(self, folder: str | Path, *, check: bool = True, batch: int = 4) -> None:
        self.folder = Path(folder)
        self.manifest = load_manifest(folder, check=check)
        self._components = Components(self.folder, self.manifest)
        limit = self.manifest.component(SEGMENTER if self.manifest.fused else "decoder").ranges.get("prompts", (1, 1))[1]
        self.batch = max(1, min(batch, limit))

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

    def encode(self, image: Any) -> EncodedImage:
        """Run the vision encoder on a picture.

        Args:
            image: a path, a ``PIL.Image.Image``, or a uint8 array (H, W, 3).

        Raises:
            SpecError: it cannot be read as a picture.
        """
        picture = open_picture(image)
        tensor = to_tensor(picture, self.manifest.image_size, self.manifest.mean, self.manifest.std)
        return EncodedImage(picture=picture, tensors=self._components.run("vision_encoder", {"image": tensor}))

    def segment(
        self,
        image: Any,
        text: str | Sequence[str] | Sequence[Sequence[int]] | None = None,
        boxes: Boxes | Sequence[Boxes] | None = None,
        labels: Sequence[bool] | Sequence[Sequence[bool]] | None = None,
        threshold: float | None = None,
    ) -> Result:
        """Everything that any of the prompts describes.

        Args:
            image: what ``encode`` returned, or anything it takes.
            text: one prompt or many, in words or token ids; each is answered on its own. None: only boxes.
            boxes: examples, x0, y0, x1, y1 in pixels: one list for all prompts, or a list a prompt.
            labels: one a box, False for an example of what is not wanted. Default all True.
            threshold: detections score above it; None: the source's own default (0.5 for Meta's, 0.3 for transformers').

        Raises:
            SpecError: neither text nor boxes, too many boxes, or lists that do not fit together.
        """
        encoded = image if isinstance(image, EncodedImage) else self.encode(image)
        width, height = encoded.picture.size
        threshold = self.manifest.threshold if threshold is None else threshold
        prompts = self._prompts(text, boxes, labels, height, width)
        masks, found, scores, owners = [], [], [], []
        for start in range(0, len(prompts), self.batch):
            for offset, (kept, score, mask) in enumerate(self._run(encoded, prompts[start : start + self.batch], threshold)):
                masks.append(_at_full_size(mask, height, width, self.manifest.mask_interpolation))
                found.append(boxes_to_pixels(kept, height, width))
                scores.append(score)
                owners.append(np.full(len(score), start + offset, dtype=np.int64))
        return Result(
            masks=np.concatenate(masks),
            boxes=np.concatenate(found),
            scores=np.concatenate(scores),
            prompt=np.concatenate(owners),
            prompts=tuple(item.name for item in prompts),
            picture=encoded.picture,
        )

    def _prompts(self, text: Any, boxes: Any, labels: Any, height: int, width: int) -> list[_Prompt]:
        texts = [text] if isinstance(text, str) else list(text) if text is not None else []
        if text is not None and not texts:
            raise SpecError("the list of texts is empty", remedy="Give at least one, or None with boxes.", step=Step.RUN)
        given = [] if boxes is None else list(boxes)
        if not texts and not given:
            raise SpecError("nothing to look for", remedy="Give text, boxes or both.", step=Step.RUN)
        nested = any(np.ndim(item) != 1 or len(item) == 0 for item in given)
        count = len(texts) or (len(given) if nested else 1)
        if nested and len(given) != count:
            raise SpecError(
                f"{len(given)} lists of boxes for {count} texts", remedy="Give a list for each, or one for all.", step=Step.RUN
            )
        limit = self.manifest.component(SEGMENTER if self.manifest.fused else "prompt_encoder").ranges["boxes"][1]
        prompts = []
        for index in range(count):
            fractions = boxes_to_fractions(given[index] if nested else given, height, width)
            own = [True] * len(fractions) if labels is None else labels[index] if nested else labels
            if len(own) != len(fractions):
                raise SpecError(f"{len(own)} labels for {len(fractions)} boxes", remedy="Give one for each.", step=Step.RUN)
            if len(fractions) > limit:
                raise SpecError(f"{len(fractions)} boxes in one prompt, the model takes at most {limit}", step=Step.RUN)
            words = texts[index] if texts else self.manifest.box_text
            ids = self._ids(words)
            name = words if isinstance(words, str) and texts else "boxes" if not texts else f"ids {ids}"
            prompts.append(_Prompt(name=name, ids=ids, boxes=fractions, labels=np.asarray(own, dtype=np.int64)))
        return prompts

    def _ids(self, words: str | Sequence[int]) -> list[int]:
        if isinstance(words, str):
            return self.tokenizer(words)
        ids, limit = [int(value) for value in words], self.manifest.context_length
        if not 0 < len(ids) <= limit or not all(0 <= value < self.manifest.vocab_size for value in ids):
            raise SpecError(f"expected 1 to {limit} token ids below {self.manifest.vocab_size}, got {ids}", step=Step.RUN)
        return ids

    def _valid(self, prompts: Sequence[_Prompt]) -> np.ndarray:
        """(prompts, length) bool, True where there is a token of the text."""
        lengths = np.array([len(item.ids) for item in prompts])
        longest = self.manifest.context_length if self.manifest.fixed_length else lengths.max()
        return np.arange(longest)[None] < lengths[:, None]

    def _run(
        self, encoded: EncodedImage, prompts: Sequence[_Prompt], threshold: float
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(boxes as fractions, scores, mask logits) of what each prompt found."""
        count, most = len(prompts), max([1, *(len(item.boxes) for item in prompts)])
        tensors = {
            **encoded.tensors,
            "input_ids": pad(
                [item.ids for item in prompts],
                self.manifest.context_length,
                self.manifest.pad_id,
                fixed_length=self.manifest.fixed_length,
            ),
            "attention_mask": self._valid(prompts),
            "boxes": np.full((count, most, 4), 0.5, dtype=np.float32),
            "box_labels": np.ones((count, most), dtype=np.int64),
            "box_mask": np.ones((count, most), dtype=bool),  # True: padding, as everywhere
        }
        for row, item in enumerate(prompts):
            used = len(item.boxes)
            tensors["boxes"][row, :used], tensors["box_labels"][row, :used] = item.boxes, item.labels
            tensors["box_mask"][row, :used] = False
        tensors.update(self._components.run("text_encoder", tensors))
        if self.manifest.fused:
            found = self._components.run(SEGMENTER, {**tensors, "threshold": np.array([threshold], dtype=np.float32)})
            for row in range(count):
                own = found["found_prompts"] == row
                yield found["found_boxes"][own], found["found_scores"][own], found["found_masks"][own]
            return
        for name in ("prompt_encoder", "fusion_encoder", "decoder"):
            tensors.update(self._components.run(name, tensors))
        scores = sigmoid(tensors["pred_logits"]) * sigmoid(tensors["presence_logit_dec"])
        for row in range(count):
            keep = np.flatnonzero(scores[row] > threshold)
            masks = np.zeros((0, 1, 1), dtype=np.float32)
            if len(keep):  # the mask head sees what is wanted alone
                own = {
                    name: value[row : row + 1]
                    for name, value in tensors.items()
                    if name in ("encoded", "prompt", "prompt_mask")
                }
                own["queries"] = np.ascontiguousarray(tensors["queries"][row : row + 1, keep])
                masks = self._components.run("mask_head", {**encoded.tensors, **own})["pred_masks"][0]
            yield tensors["pred_boxes"][row, keep], scores[row, keep], masks


def _at_full_size(masks: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """Masks at the picture's size, more probable than not; one at a time, as many large ones would fill the memory."""
    full = np.zeros((len(masks), height, width), dtype=bool)
    values, border = (masks, 0.0) if interpolation == "logits" else (sigmoid(masks), 0.5)
    for index in range(len(masks)):
        full[index] = resize_bilinear(values[index : index + 1], height, width)[0] > border
    return full
