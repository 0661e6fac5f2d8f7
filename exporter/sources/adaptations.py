"""What upstream's code needs to be traced without CUDA, each a narrow change that is put back.

Meta's classes run as they are; these touch one name each while a component runs, eager or traced.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


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
def sdp_kernels_kept() -> Iterator[None]:
    """Put CUDA's attention kernels back as they were: the mask decoder's attention allows all of them on every forward."""
    kernels = torch.backends.cuda
    before = kernels.flash_sdp_enabled(), kernels.math_sdp_enabled(), kernels.mem_efficient_sdp_enabled()
    try:
        yield
    finally:
        kernels.enable_flash_sdp(before[0])
        kernels.enable_math_sdp(before[1])
        kernels.enable_mem_efficient_sdp(before[2])


@contextlib.contextmanager
def answering(module: nn.Module, method: str, answer: Any) -> Iterator[None]:
    """A method of ``module`` (a private shadow) gives ``answer``, whatever it is asked."""
    module.__dict__[method] = lambda *_, **__: answer
    try:
        yield
    finally:
        del module.__dict__[method]


class _Masked(TorchFunctionMode):
    """Give ``scaled_dot_product_attention`` a mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is nn.functional.scaled_dot_product_attention:
            options["attn_mask"] = self.mask
        return func(*args, **options)


@contextlib.contextmanager
def keys_hidden(attentions: Iterable[nn.Module], hidden: Tensor) -> Iterator[None]:
    """Attention of these modules (of a private shadow) gives no weight to the keys that are ``hidden``, (batch, keys) bool.

    transformers' modules take a mask; Meta's do not, so theirs reaches ``scaled_dot_product_attention`` by itself.
    """
    modules = list(attentions)
    seen = ~hidden[:, None, None]
    for module in modules:
        module.__dict__["forward"] = _masked(module.forward, seen)
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def _masked(forward: Callable[..., Any], seen: Tensor) -> Callable[..., Any]:
    if "attention_similarity" in inspect.signature(forward).parameters:

        def called(query: Tensor, **options: Any) -> Any:
            scores = torch.where(seen, 0.0, -torch.inf).to(query.dtype)  # added, as its own eager attention does
            return forward(query=query, **{**options, "attention_similarity": scores})

        return called

    def called_masked(*args: Any, **options: Any) -> Any:
        with _Masked(seen):
            return forward(*args, **options)

    return called_masked


def every_mask(decoder: nn.Module) -> None:
    """transformers' mask decoder (a private shadow module), asked for one mask, gives that and then the three of the others."""
    choose: Callable[..., Any] = decoder._dynamic_multimask_via_stability  # type: ignore[assignment]
    stable = bool(decoder.dynamic_multimask_via_stability)

    def chosen(masks: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        single, single_score = choose(masks, scores) if stable else (masks[:, :, :1], scores[:, :, :1])
        return torch.cat([single, masks[:, :, 1:]], dim=2), torch.cat([single_score, scores[:, :, 1:]], dim=2)

    decoder.__dict__.update(dynamic_multimask_via_stability=True, _dynamic_multimask_via_stability=chosen)


def _symbolic_len(x: Any) -> Any:
    return x.shape[0] if isinstance(x, Tensor) and x.dim() else len(x)


class _AlsoSymbolic(type):
    """``int`` to whoever asks what it is; called, it leaves a symbolic size symbolic."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], (torch.SymInt, torch.SymFloat)):
            return torch.sym_int(args[0])
        return int(*args, **options)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, int)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, int)

    def __eq__(cls, other: object) -> bool:
        return other is int or other is cls

    def __hash__(cls) -> int:
        return hash(int)


class _SymbolicInt(int, metaclass=_AlsoSymbolic):
    pass


_borrowed: dict[tuple[int, str], int] = {}
"""(id of a namespace, name set in it) → by how many threads."""
_borrowing = threading.Lock()


@contextlib.contextmanager
def symbolic_sizes(module: nn.Module, *, numbers: bool = False) -> Iterator[None]:
    """In all code of ``module``'s source ``len(x)`` of a tensor gives ``x.shape[0]``; the built-in makes a number of it.

    The source: every package that a class in the tree comes from, but torch. Its modules get a global ``len``, which does for
    anything else, and in any other thread, what the built-in does.

    Args:
        numbers: ``int(size)`` leaves a dynamic size as it is, too.
    """
    names: dict[str, Any] = {"len": _symbolic_len, **({"int": _SymbolicInt} if numbers else {})}
    held = []
    with _borrowing:
        for namespace in _namespaces(module):
            for name, value in names.items():
                key = (id(namespace), name)
                if key in _borrowed or name not in namespace:  # a name of the source's own is left alone
                    namespace[name] = value
                    _borrowed[key] = _borrowed.get(key, 0) + 1
                    held.append((namespace, name, key))
    try:
        yield
    finally:
        with _borrowing:
            for namespace, name, key in held:
                _borrowed[key] -= 1
                if not _borrowed[key]:
                    del _borrowed[key]
                    namespace.pop(name, None)


def _namespaces(module: nn.Module) -> list[dict[str, Any]]:
    """Globals of the code that ``module`` and its children may run."""
    kinds = {kind for child in module.modules() for kind in type(child).__mro__ if not _is_foreign(kind.__module__)}
    packages = {kind.__module__.partition(".")[0] for kind in kinds}
    found = [vars(item) for name, item in list(sys.modules.items()) if name.partition(".")[0] in packages and item is not None]
    functions = (value for kind in kinds for value in vars(kind).values() if isinstance(value, FunctionType))
    found += [value.__globals__ for value in functions if not _is_foreign(str(value.__globals__.get("__name__")))]
    return list({id(namespace): namespace for namespace in found}.values())


def _is_foreign(name: str) -> bool:
    return name.partition(".")[0] in ("torch", "builtins", "sam3x")


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
    """The geometry encoder (a private shadow module) skips the layers for points when it is given none."""
    encode: Callable[..., Any] = encoder._encode_points  # type: ignore[assignment]

    def points_or_none(points: Tensor, points_mask: Tensor, points_labels: Tensor, img_feats: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(points.shape[0], int) and points.shape[0] == 0:
            return points.new_zeros((0, points.shape[1], int(encoder.d_model))), points_mask  # type: ignore[arg-type]
        return encode(points=points, points_mask=points_mask, points_labels=points_labels, img_feats=img_feats)

    encoder.__dict__["_encode_points"] = points_or_none


def boxes_of_one_picture(encoder: nn.Module, *, batch_first: bool) -> None:
    """The geometry encoder (a private shadow module) encodes the boxes of all prompts as boxes of one picture.

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
