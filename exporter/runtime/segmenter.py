"""``Segmenter``: an exported pipeline behind three calls: ``encode`` a picture, ``segment`` it by words, ``click`` on it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3x.errors import ArtifactError, SpecError, Step
from sam3x.runtime.clicks import Click, check_inside, read_clicks, to_arrays
from sam3x.runtime.components import Components
from sam3x.runtime.detect import Found, PromptReader, detect, result_of
from sam3x.runtime.everything import Kept, grid
from sam3x.runtime.manifest import SEGMENTER, load_manifest
from sam3x.runtime.pictures import open_picture, to_tensor
from sam3x.runtime.prompts import Prompt, boxes_to_fractions, truth, whole_number
from sam3x.runtime.regions import mended
from sam3x.runtime.result import Clicked, Result, joined
from sam3x.runtime.text import Tokenizer
from sam3x.sources.clicks import Clicks
from sam3x.sources.names import INTERACTIVE_HEAD
from sam3x.warning_filters import warnings_not_raised

if TYPE_CHECKING:
    from PIL import Image

Boxes = Sequence[Sequence[float]]
"""Boxes of x0, y0, x1, y1 in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedImage:
    """A picture and what the vision encoder made of it; use it for as many prompts as you like.

    Attributes:
        picture: RGB, turned as its EXIF orientation said.
        tensors: the vision encoder's outputs by name.
        weights_sha256: of the pipeline that made them; only one of the same weights and picture size takes them.
    """

    picture: Image.Image
    tensors: dict[str, np.ndarray] = field(repr=False)
    weights_sha256: str


class Segmenter:
    """An exported pipeline, opened once. Component files are loaded when they are first needed.

    ``with Segmenter(folder) as segmenter:`` or ``close()`` lets go of the files and their memory. A pickle holds the folder's
    path and the arguments, and opens the folder again where it is read.

    Args:
        folder: what ``sam3x export --pipeline`` wrote.
        check: compare every file with its sha256 first.
        batch: prompts or objects that go through the model together; memory grows with it.
        threads: of one operator, where the pipeline runs in ONNX Runtime; None: one for each core.
        providers: ONNX Runtime's execution providers, the one to be preferred first: a name (``"cuda"`` or
            ``"CUDAExecutionProvider"``), or a list of names and of pairs (name, options). None: the CPU.
        max_pixels: most pixels that a picture's file may hold; None: as many as Pillow decodes (178,956,970).

    Attributes:
        arguments: all of these but ``folder``, as they were given.

    Raises:
        ArtifactError: ``folder`` is no pipeline, or a file was changed.
        SpecError: an argument of another kind, or a setting that the pipeline's target does not have.
        TargetUnavailableError: a package or a provider is missing, with the command that installs it.
    """

    @warnings_not_raised()
    def __init__(
        self,
        folder: str | Path,
        *,
        check: bool = True,
        batch: int = 4,
        threads: int | None = None,
        providers: str | Sequence[str | tuple[str, dict[str, Any]]] | None = None,
        max_pixels: int | None = None,
    ) -> None:
        if not isinstance(folder, (str, os.PathLike)) or "\0" in str(folder):
            raise SpecError(f"the folder of a pipeline is a path, got {folder!r}", step=Step.LOAD)
        self.folder = Path(folder)
        self.arguments = {"check": check, "batch": batch, "threads": threads, "providers": providers, "max_pixels": max_pixels}
        self.max_pixels = None if max_pixels is None else whole_number(max_pixels, "max_pixels")
        batch = whole_number(batch, "batch")
        self.manifest = load_manifest(folder, check=check)
        self._reader = PromptReader(self.folder, self.manifest)
        self._components = Components(self.folder, self.manifest, threads=threads, providers=providers)
        heads = [item for item in self.manifest.components if item.name in (SEGMENTER, "decoder", INTERACTIVE_HEAD)]
        most = [item.ranges.get("prompts", (1, 1))[1] for item in heads or [self.manifest.component("decoder")]]
        self.batch = min(batch, *most)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (str(self.folder.absolute()), self.arguments)

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the component files and their memory. ``encode`` and ``segment`` then raise ``ArtifactError``."""
        self._components.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """Words to ids. Raises ``ArtifactError`` where the pipeline was exported without a vocabulary."""
        return self._reader.tokenizer

    @warnings_not_raised()
    def encode(self, image: Any) -> EncodedImage:
        """Run the vision encoder on a picture.

        Args:
            image: a path, the bytes of a file, a binary file object, a ``PIL.Image.Image`` of any mode, an array or nested list
                (H, W), (H, W, 3) or (H, W, 4), or a torch tensor (3, H, W). See ``sam3x.runtime.pictures.open_picture``.

        Raises:
            SpecError: it cannot be read as a picture.
        """
        picture = open_picture(image, self.max_pixels)
        tensor = to_tensor(picture, self.manifest.image_size, self.manifest.mean, self.manifest.std)
        tensors = self._components.run("vision_encoder", {"image": tensor})
        return EncodedImage(picture=picture, tensors=tensors, weights_sha256=self.manifest.weights_sha256)

    def prompts(
        self,
        text: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | None = None,
        boxes: Boxes | Sequence[Boxes] | None = None,
        labels: Sequence[bool] | Sequence[Sequence[bool]] | None = None,
        threshold: float | Sequence[float] | None = None,
    ) -> tuple[Prompt, ...]:
        """Read and check prompts, which ``segment`` does before anything else; its arguments, and what it raises."""
        return self._reader.read(text, boxes, labels, threshold)

    @warnings_not_raised()
    def segment(
        self,
        image: Any,
        text: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | None = None,
        boxes: Boxes | Sequence[Boxes] | None = None,
        labels: Sequence[bool] | Sequence[Sequence[bool]] | None = None,
        threshold: float | Sequence[float] | None = None,
        max_detections: int | None = None,
    ) -> Result:
        """Everything that any of the prompts describes.

        Args:
            image: what ``encode`` returned, or anything it takes.
            text: one prompt or many, in words or token ids; each is answered on its own. None: only boxes.
            boxes: examples, x0, y0, x1, y1 in pixels: one list for all prompts, or a list a prompt. A box may reach over the
                picture's edge.
            labels: one a box and listed as the boxes are, False for an example of what is not wanted. Default all True.
            threshold: detections score above it, 0 to 1: one for all prompts, or one for each. None: the source's own default
                (0.5 for Meta's, 0.3 for transformers').
            max_detections: keep as many of each prompt, those that score highest. None: all.

        Raises:
            SpecError: a picture or a prompt that cannot be read, neither text nor boxes, too many boxes, a box outside the
                picture, lists that do not fit together, or an ``EncodedImage`` of another pipeline.
            ArtifactError: words for a pipeline without a vocabulary, or a file that cannot be run.
        """
        prompts = self.prompts(text, boxes, labels, threshold)
        most = None if max_detections is None else whole_number(max_detections, "max_detections")
        encoded = self._checked(image) if isinstance(image, EncodedImage) else self.encode(image)
        width, height = encoded.picture.size
        fractions = [boxes_to_fractions(item.boxes, height, width) for item in prompts]
        found: list[Found] = []
        for start in range(0, len(prompts), self.batch):
            batch = slice(start, start + self.batch)
            asked = self._reader.asked(prompts[batch], fractions[batch])
            found += detect(self._components.run, self.manifest, encoded.tensors, asked, most)
        return result_of(found, prompts, encoded.picture, self.manifest)

    @property
    def clickable(self) -> bool:
        """Whether ``click`` works: the pipeline has an interactive head."""
        return self.manifest.clicks is not None

    def clicks(self, points: Any = None, labels: Any = None, box: Any = None, mask: Any = None) -> tuple[Click, ...]:
        """Read and check clicks, which ``click`` does before anything else; its arguments, and what it raises."""
        head = self._head()
        clicks = read_clicks(points, labels, box, mask, mask_size=self._mask_size)
        most = self.manifest.component(INTERACTIVE_HEAD).ranges.get("points", (1, 1))[1]
        rows = max(click.rows(head.rows_of_mask_alone) for click in clicks)
        if rows > most:
            fact = f"the model takes at most {most - 1} points of an object, two of them for a box, got {rows - 1}"
            raise SpecError(fact, step=Step.RUN)
        return clicks

    @warnings_not_raised()
    def click(
        self,
        image: Any,
        points: Any = None,
        labels: Any = None,
        box: Any = None,
        mask: Any = None,
        multimask: bool = True,
    ) -> Clicked:
        """What points, a box or an earlier mask mean, as SAM2 and SAM3's interactive predictor answer them.

        Args:
            image: what ``encode`` returned, or anything it takes.
            points: x and y in pixels of the picture: a list of points of one object, or a list of lists for several, which need
                not have as many.
            labels: one a point and listed as the points are, 1 or True for a point of the object, 0 or False for one outside.
                Default all 1.
            box: x0, y0, x1, y1 in pixels, or one for each object. It may reach over the picture's edge, by as much as the
                picture is large.
            mask: logits of an earlier answer, ``result.best.logits``, within 1e4 of 0: (h, w) or (1, h, w) for one object,
                (objects, h, w) for several. Lists of boxes and masks may hold None.
            multimask: three masks for each object, for a prompt that may mean several things, such as one point; else one, the
                model's own for it, or the best of the three where that is unstable.

        Raises:
            SpecError: a picture or a click that cannot be read, nothing clicked, a point outside the picture, too many points,
                lists that do not fit together, or an ``EncodedImage`` of another pipeline.
            ArtifactError: the pipeline has no interactive head, or a file cannot be run.
        """
        clicks, several = self.clicks(points, labels, box, mask), truth(multimask, "multimask")
        encoded = self._checked(image) if isinstance(image, EncodedImage) else self.encode(image)
        check_inside(clicks, *encoded.picture.size)
        return joined(list(self._answers(encoded, clicks, several)))

    @warnings_not_raised()
    def everything(
        self,
        image: Any,
        *,
        points_per_side: int = 32,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        max_detections: int | None = None,
    ) -> Clicked:
        """Masks of everything: three for each point of a grid, filtered and de-duplicated as SAM's automatic generator does.

        Every mask is an object of its own, the one that scores highest first. Arguments and defaults are those of SAM's
        ``SamAutomaticMaskGenerator`` and of transformers' ``mask-generation`` pipeline, without crops.

        Args:
            image: what ``encode`` returned, or anything it takes.
            points_per_side: of the grid. ``batch`` of them go through the head together.
            pred_iou_thresh: masks whose score, the IoU that the model predicts, is above it stay, 0 to 1.
            stability_score_thresh: masks stay that are stable: their area where logits are above the threshold and
                ``stability_score_offset`` is more than this share of that where they are above it less the offset.
            stability_score_offset: in logits.
            box_nms_thresh: of two masks whose boxes overlap by more, as IoU, the one that scores higher stays.
            max_detections: keep as many, those that score highest. None: all.

        Raises:
            SpecError: a picture that cannot be read, an argument of another kind, or an ``EncodedImage`` of another pipeline.
            ArtifactError: the pipeline has no interactive head, or a file cannot be run.
        """
        self._head()
        rules = Kept(
            pred_iou_thresh=pred_iou_thresh,
            stability_score_thresh=stability_score_thresh,
            stability_score_offset=stability_score_offset,
            box_nms_thresh=box_nms_thresh,
        )
        side = whole_number(points_per_side, "points_per_side")
        most = None if max_detections is None else whole_number(max_detections, "max_detections")
        encoded = self._checked(image) if isinstance(image, EncodedImage) else self.encode(image)
        clicks = grid(side, *encoded.picture.size)
        found = joined([item.chosen(rules.stable(item)) for item in self._answers(encoded, clicks, multimask=True)])
        return found.chosen(rules.distinct(found)[:most]).numbered()

    def _answers(self, encoded: EncodedImage, clicks: Sequence[Click], multimask: bool) -> Iterator[Clicked]:
        """The masks of some objects after the other."""
        head = self._head()
        chosen = slice(1, None) if multimask else slice(0, 1)
        for start in range(0, len(clicks), self.batch):
            batch = clicks[start : start + self.batch]
            given = to_arrays(batch, encoded.picture.size, self.manifest.image_size, self._mask_size, head.rows_of_mask_alone)
            out = self._components.run(INTERACTIVE_HEAD, {**encoded.tensors, **given})
            masks, scores = out["low_res_masks"][:, chosen], out["iou_predictions"][:, chosen]
            count, masks = masks.shape[1], masks.reshape(-1, *masks.shape[2:])
            yield Clicked(
                small_masks=mended(masks, head.mask_threshold, head.max_hole_area, head.max_sprinkle_area),
                border=head.mask_threshold,
                logits=masks if head.largest_logit is None else masks.clip(-head.largest_logit, head.largest_logit),
                scores=scores.ravel(),
                prompt=np.repeat(np.arange(start, start + len(batch)), count),
                prompts=tuple(f"object {index + 1}" for index in range(len(clicks))),
                picture=encoded.picture,
            )

    def _head(self) -> Clicks:
        """How the interactive head's logits become masks. Raises ``ArtifactError`` where there is none."""
        if self.manifest.clicks is None:
            raise ArtifactError(
                f"{self.folder} was exported without an interactive head, so clicks cannot be answered",
                remedy="Export a source that has one, with its interactive_head: leave --components out.",
                step=Step.RUN,
            )
        return self.manifest.clicks

    @property
    def _mask_size(self) -> tuple[int, int]:
        """Height and width of the interactive head's masks."""
        given = next(item for item in self.manifest.component(INTERACTIVE_HEAD).inputs if item.name == "mask_input")
        return int(given.shape[-2]), int(given.shape[-1])

    def _checked(self, encoded: EncodedImage) -> EncodedImage:
        """An ``EncodedImage`` whose tensors are those that this pipeline's components read."""
        spec = self.manifest.component("vision_encoder")
        fits = encoded.weights_sha256 == self.manifest.weights_sha256 and all(
            _is(encoded.tensors.get(spec.writes[item.name]), item.dtype, item.shape) for item in spec.outputs
        )
        if not fits:
            raise SpecError(
                "the EncodedImage was made by a pipeline of other weights or another picture size",
                remedy="Encode the picture with this Segmenter.",
                step=Step.RUN,
            )
        return encoded


def _reopened(folder: str, arguments: dict[str, Any]) -> Segmenter:
    return Segmenter(folder, **arguments)


def _is(value: Any, dtype: str, shape: Sequence[int | str]) -> bool:
    """Whether ``value`` is an array of one picture, of that dtype and, the first size aside, that shape."""
    return isinstance(value, np.ndarray) and value.dtype == np.dtype(dtype) and value.shape == (1, *shape[1:])
