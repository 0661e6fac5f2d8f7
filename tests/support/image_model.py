"""A small ``Sam3Image`` of Meta's own classes, a vocabulary, a photograph, and upstream's processor as the definition."""

from __future__ import annotations

import copy
import gzip
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn

from sam3x.pipeline.compatibility import SMALL
from sam3x.pipeline.job import ComponentJob
from sam3x.runtime.manifest import ComponentSpec, load_manifest
from sam3x.sources.adaptations import unpinned
from sam3x.sources.contract import Component
from sam3x.sources.encoder import weights_hash
from sam3x.sources.image import draw_image_weights
from sam3x.sources.image_model import build_image_model

TINY = SMALL
MERGES = [
    "t h",
    "th e</w>",
    "d o",
    "do g</w>",
    "r e",
    "re d</w>",
    "c a",
    "ca r</w>",
    "a n",
    "an d</w>",
    "v i",
    "s u",
    "a l</w>",
]


def write_vocabulary(path: Path) -> Path:
    """A ``bpe_simple_vocab``-like file: a head line, then merges."""
    path.write_bytes(gzip.compress(("#version: 0.2\n" + "\n".join(MERGES)).encode()))
    return path


def tiny_image_model(vocabulary: Path, seed: int = 5, image_size: int = TINY.image_size) -> nn.Module:
    """``TINY`` with distinct weights, upstream's own tokenizer, and its interactive predictor, whose tracker has no memory."""
    import warnings

    from sam3.model.sam1_task_predictor import SAM3InteractiveImagePredictor
    from sam3.model.sam3_tracker_base import Sam3TrackerBase
    from sam3.model.tokenizer_ve import SimpleTokenizer

    config = TINY.model_copy(update={"interactive": True, "image_size": image_size})
    model: Any = build_image_model(config, SimpleTokenizer(bpe_path=str(vocabulary)))
    tracker = Sam3TrackerBase(
        backbone=None,
        transformer=SimpleNamespace(decoder=None, d_model=TINY.d_model),
        maskmem_backbone=None,
        image_size=image_size,
        backbone_stride=TINY.patch_size,
        sam_mask_decoder_extra_args=model.inst_interactive_predictor.model.sam_mask_decoder_extra_args,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        predictor: Any = SAM3InteractiveImagePredictor(tracker)
    size = image_size // TINY.patch_size
    predictor._bb_feat_sizes = [(4 * size, 4 * size), (2 * size, 2 * size), (size, size)]  # upstream's are SAM3's own
    model.inst_interactive_predictor = predictor
    draw_image_weights(model, seed)
    return model.eval()


class Predictor:
    """Upstream's processor and ``Sam3Image.predict_inst`` on one picture, with connected pixels counted as by scikit-image.

    It works on a copy of ``model``.
    """

    def __init__(self, model: nn.Module, picture: Image.Image, size: int = TINY.image_size) -> None:
        from sam3.model.sam3_image_processor import Sam3Processor

        self.model: Any = copy.deepcopy(model)
        with unpinned():
            self.state = Sam3Processor(self.model, resolution=size, device="cpu").set_image(picture)

    def __call__(self, **prompt: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks (..., H, W), scores and low-resolution logits, as ``SAM3InteractiveImagePredictor.predict`` gives them."""
        from scipy import ndimage

        def label(values: np.ndarray, return_num: bool) -> tuple[np.ndarray, int]:
            return ndimage.label(values, np.ones((3, 3)))

        measure = ModuleType("skimage.measure")
        measure.label = label  # type: ignore[attr-defined]
        with mock.patch.dict(sys.modules, {"skimage": ModuleType("skimage"), "skimage.measure": measure}):
            return self.model.predict_inst(self.state, **prompt)


def state_of(model: nn.Module) -> tuple[str, list[tuple[str, str, int, int]]]:
    """What tells that a model was changed: its weights, and every attribute of its modules, how much a dict holds included."""
    attributes = [
        (name, key, id(value), len(value) if isinstance(value, dict) else 0)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    ]
    return weights_hash(model), attributes


def photograph() -> Image.Image:
    """A photograph of 640 by 427 pixels that scikit-learn ships."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))


def processor_result(
    model: nn.Module,
    picture: Image.Image,
    text: str | None,
    boxes: Sequence[Sequence[float]] = (),
    labels: Sequence[bool] = (),
    threshold: float = 0.5,
    size: int = TINY.image_size,
) -> dict[str, Any]:
    """Upstream's ``Sam3Processor`` on one prompt; boxes are x0, y0, x1, y1 in pixels.

    It works on a copy of ``model``: upstream's decoder keeps coordinates on itself once it has run.
    """
    from sam3.model.sam3_image_processor import Sam3Processor

    processor = Sam3Processor(copy.deepcopy(model), resolution=size, device="cpu", confidence_threshold=threshold)
    width, height = picture.size
    with unpinned():
        state = processor.set_image(picture)
        if text is not None:
            state = processor.set_text_prompt(text, state)
        for box, label in zip(boxes, labels or [True] * len(boxes), strict=True):
            x0, y0, x1, y1 = box
            middle = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
            state = processor.add_geometric_prompt(middle, label, state)
    return {
        "masks": state["masks"][:, 0].numpy(),
        "boxes": state["boxes"].numpy(),
        "scores": state["scores"].numpy(),
        "image": processor.transform(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)).numpy(),
    }


def iou(left: np.ndarray, right: np.ndarray) -> float:
    """Of two bool masks; two empty ones are equal."""
    union = (left | right).sum()
    return float((left & right).sum() / union) if union else 1.0


def between(scores: np.ndarray) -> float:
    """A threshold that keeps about half, well away from every score."""
    ordered = np.sort(scores)
    inner = slice(len(ordered) // 4, 3 * len(ordered) // 4)
    at = int(np.argmax(np.diff(ordered)[inner])) + len(ordered) // 4
    return float(ordered[at] + ordered[at + 1]) / 2


def taken_from(exported: Path, *others: str) -> Callable[..., ComponentSpec]:
    """``ComponentJob.export`` that copies what ``exported`` has, in place of a minute's work, but for ``others``."""
    real, manifest = ComponentJob.export, load_manifest(exported)

    def export(job: ComponentJob, component: Component, *samples: Any) -> ComponentSpec:
        if component.name in others:
            return real(job, component, *samples)
        spec = manifest.component(component.name)
        shutil.copy(exported / spec.file, job.folder)
        return spec.model_copy(update={"ranges": dict(component.ranges)})  # as asked: its file takes more

    return export
