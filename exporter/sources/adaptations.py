"""What upstream's code needs to be traced without CUDA, each a narrow change that is put back.

Meta's classes run as they are; these touch one name each while a component runs, eager or traced.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def unpinned() -> Iterator[None]:
    """``Tensor.pin_memory`` does nothing: it needs a CUDA driver, and the geometry encoder calls it on every forward."""
    with mock.patch.object(torch.Tensor, "pin_memory", lambda self, *_, **__: self):
        yield


@contextlib.contextmanager
def numbers_on_cpu() -> Iterator[None]:
    """``torch.linspace`` stays on the CPU: the ViT trunk reads drop-path rates from it, which meta tensors lack."""
    made = torch.linspace
    with mock.patch.object(torch, "linspace", lambda *args, **options: made(*args, **{**options, "device": "cpu"})):
        yield


@contextlib.contextmanager
def wide_floats() -> Iterator[None]:
    """``Tensor.float`` leaves float64 and complex128 alone, for the float64 run of code that casts to single precision."""
    single = torch.Tensor.float

    def kept(self: Tensor, *args: Any, **options: Any) -> Tensor:
        return self if self.dtype in (torch.float64, torch.complex128) else single(self, *args, **options)

    with mock.patch.object(torch.Tensor, "float", kept):
        yield


@contextlib.contextmanager
def symbolic_len(module: nn.Module) -> Iterator[None]:
    """``len(x)`` in the file of ``module``'s class gives ``x.shape[0]``: the built-in turns a dynamic size into a number."""
    namespace = sys.modules[type(module).__module__]
    with mock.patch.object(namespace, "len", lambda x: x.shape[0] if isinstance(x, Tensor) else len(x), create=True):
        yield


@contextlib.contextmanager
def no_empty_joins(module: nn.Module) -> Iterator[None]:
    """``concat_padded_sequences`` with an empty first sequence returns the second: ONNX Runtime refuses zero-size shapes."""
    namespace = sys.modules[type(module).__module__]
    join = namespace.concat_padded_sequences

    def joined(seq1: Tensor, mask1: Tensor, seq2: Tensor, mask2: Tensor, return_index: bool = False) -> Any:
        if isinstance(seq1.shape[0], int) and seq1.shape[0] == 0 and not return_index:
            return seq2, mask2
        return join(seq1, mask1, seq2, mask2, return_index)

    with mock.patch.object(namespace, "concat_padded_sequences", joined):
        yield


def without_points(encoder: nn.Module) -> None:
    """The geometry encoder (a private twin) skips the layers for points when it is given none."""
    encode: Callable[..., Any] = encoder._encode_points  # type: ignore[assignment]

    def points_or_none(points: Tensor, points_mask: Tensor, points_labels: Tensor, img_feats: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(points.shape[0], int) and points.shape[0] == 0:
            return points.new_zeros((0, points.shape[1], int(encoder.d_model))), points_mask  # type: ignore[arg-type]
        return encode(points=points, points_mask=points_mask, points_labels=points_labels, img_feats=img_feats)

    encoder.__dict__["_encode_points"] = points_or_none


def boxes_of_one_picture(encoder: nn.Module, *, batch_first: bool) -> None:
    """The geometry encoder (a private twin) encodes the boxes of all prompts as boxes of one picture.

    Upstream unbinds the batch for ``roi_align``, which needs to know how many prompts there are. Boxes are encoded one by one,
    so prompts that look at the same picture can share one row of the batch.
    """
    encode: Callable[..., Any] = encoder._encode_boxes  # type: ignore[assignment]

    def folded(boxes: Tensor, boxes_mask: Tensor, boxes_labels: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """``boxes`` (N, B, 4) in Meta's layout, (B, N, 4) in transformers'."""
        first, second = boxes.shape[:2]
        row = (1, first * second) if batch_first else (first * second, 1)
        embeds, _ = encode(boxes.reshape(*row, 4), boxes_mask.reshape(1, -1), boxes_labels.reshape(row), features[:1])
        return embeds.reshape(first, second, -1), boxes_mask

    names = list(inspect.signature(encode).parameters)

    def called(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:  # upstream calls it by names or by position
        return folded(*args, *(options[name] for name in names[len(args) :]))

    encoder.__dict__["_encode_boxes"] = called
