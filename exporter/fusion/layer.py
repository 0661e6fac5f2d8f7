"""One fusion layer with its branches as values: Python bools in eager, bool tensors (``torch.cond``) in a capture.

``fusion_layer`` is the definition of upstream's ``TransformerEncoderLayer`` (sam3/model/encoder.py, ``forward_pre`` and
``forward_post``) written so that only the norms and dac's halving depend on a flag. Where upstream itself cannot run (dac with
a full-batch ``query_pos`` or target mask) it adds the missing rule: both are sliced as ``tgt`` is sliced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sam3x.errors import SourceError
from sam3x.fusion.shadow import holding, shallow_copy

LayerFlag = bool | Tensor
OPTIONAL_INPUTS = ("tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "pos", "query_pos")
_STOCK_ATTRIBUTES = [
    "self_attn",
    "cross_attn_image",
    "linear1",
    "linear2",
    "norm1",
    "norm2",
    "norm3",
    "dropout",
    "dropout1",
    "dropout2",
    "dropout3",
    "activation",
    "pre_norm",
    "pos_enc_at_attn",
    "pos_enc_at_cross_attn_queries",
    "pos_enc_at_cross_attn_keys",
]


def branch(flag: LayerFlag, if_true: Callable[..., Tensor], if_false: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """Choose by a Python bool now, or by a bool scalar tensor in the graph (``torch.ops.higher_order.cond``)."""
    if isinstance(flag, bool):
        return (if_true if flag else if_false)(*operands)
    # the operator itself, not torch.cond: torch.cond starts dynamo for each call, 0.4 s apiece
    return torch.ops.higher_order.cond(flag, lambda *a: (if_true(*a),), lambda *a: (if_false(*a),), operands)[0]


def _lifted(module: nn.Module) -> list[Tensor]:
    """Its parameters and buffers, each once, to be operands of a branch."""
    return [*module.parameters(), *module.buffers()]


def _called(module: nn.Module, lifted: list[Tensor], operands: Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Call ``module`` with ``operands`` in the place of what was ``lifted``."""
    with holding(module, dict(zip(map(id, lifted), operands, strict=True))):
        return module(*args, **kwargs)


def _and(left: LayerFlag, right: LayerFlag) -> LayerFlag:
    if isinstance(left, bool):
        return right if left else False
    if isinstance(right, bool):
        return left if right else False
    return torch.logical_and(left, right)


def _not(flag: LayerFlag) -> LayerFlag:
    return (not flag) if isinstance(flag, bool) else torch.logical_not(flag)


def _norm_if(flag: LayerFlag, norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(flag, bool):
        return norm(x) if flag else x
    lifted = _lifted(norm)
    return branch(flag, lambda x, *operands: _called(norm, lifted, operands, x), lambda x, *_: x.clone(), x, *lifted)


def _rows(half: LayerFlag, x: Tensor, dim: int) -> int:
    """How much of ``x``'s dimension ``dim`` self-attention works on: all, or the first half where ``half``.

    As a runtime flag the number comes out of a conditional over one short vector, an unbacked size that is right at every
    batch; the tensors themselves are then sliced outside, so that attention and its weights stand once.
    """
    size = x.shape[dim]
    if isinstance(half, bool):
        return size // 2 if half else size
    vector = x.select(2, 0).select(1 - dim, 0)
    chosen = branch(half, lambda v: v.narrow(0, 0, v.shape[0] // 2).clone(), lambda v: v.clone(), vector).shape[0]
    torch._check(chosen <= size)
    # what torch assumes of every dynamic size while tracing (0 and 1 broadcast); the checks themselves do not stay in the graph
    torch._check(chosen >= 2)
    return chosen


def _head(name: str, value: Tensor | None, dim: int, rows: int) -> Tensor | None:
    """The part of an input that belongs to the first ``rows`` queries: (B, N, C), (N, N) mask, (B, N) padding."""
    if value is None or (dim == 0 and (name == "tgt_mask" or value.shape[0] == 1)):
        return value
    value = value.narrow(0 if name == "tgt_mask" else dim, 0, rows)
    return value.narrow(1, 0, rows) if name == "tgt_mask" else value


def fusion_layer(
    layer: Any,
    tgt: Tensor,
    memory: Tensor,
    *,
    dac: LayerFlag = False,
    pre_norm: LayerFlag | None = None,
    dac_dim: int = 0,
    **optional: Tensor | None,
) -> Tensor:
    """Upstream's layer, its flags as values.

    Args:
        layer: a module with upstream's attributes (``is_stock`` decides); used, never changed.
        tgt: (B, N, C). memory: (B, S, C).
        dac: self-attend only the first half of ``tgt``'s dimension ``dac_dim``; ignored by post-norm layers, as upstream.
        pre_norm: None keeps the layer's own.
        optional: ``tgt_mask`` (N, N), ``memory_mask`` (N, S), ``tgt_key_padding_mask`` (B, N), ``memory_key_padding_mask``
            (B, S), ``pos`` (B, S, C), ``query_pos`` (B, N, C) or (1, N, C).

    Returns:
        (B, N, C).
    """
    pre: LayerFlag = bool(layer.pre_norm) if pre_norm is None else pre_norm
    post = _not(pre)
    query_pos, pos = optional.get("query_pos"), optional.get("pos")
    halved = _and(dac, pre)
    whole = halved is False
    rows = 0 if whole else _rows(halved, tgt, dac_dim)

    def head(name: str, value: Any) -> Any:
        return value if whole else _head(name, value, dac_dim, rows)

    y = head("tgt", _norm_if(pre, layer.norm1, tgt))
    positions = head("query_pos", query_pos) if layer.pos_enc_at_attn else None
    qk = y if positions is None else y + positions
    attended = layer.self_attn(
        qk,
        qk,
        value=y,
        attn_mask=head("tgt_mask", optional.get("tgt_mask")),
        key_padding_mask=head("tgt_key_padding_mask", optional.get("tgt_key_padding_mask")),
    )[0]
    joined = head("tgt", tgt) + attended
    if not whole:
        rest = tgt.narrow(dac_dim, rows, tgt.shape[dac_dim] - rows)
        joined = torch.cat((joined, rest), dim=dac_dim)
    tgt = _norm_if(post, layer.norm1, joined)

    y = _norm_if(pre, layer.norm2, tgt)
    tgt = (
        tgt
        + layer.cross_attn_image(
            query=y + query_pos if layer.pos_enc_at_cross_attn_queries and query_pos is not None else y,
            key=memory + pos if layer.pos_enc_at_cross_attn_keys and pos is not None else memory,
            value=memory,
            attn_mask=optional.get("memory_mask"),
            key_padding_mask=optional.get("memory_key_padding_mask"),
        )[0]
    )
    tgt = _norm_if(post, layer.norm2, tgt)

    y = _norm_if(pre, layer.norm3, tgt)
    tgt = tgt + layer.linear2(layer.activation(layer.linear1(y)))
    return _norm_if(post, layer.norm3, tgt)


class _SliceQueryPos(TorchFunctionMode):
    """Give upstream's own ``tgt + query_pos`` the half of ``query_pos`` that belongs to a halved ``tgt``."""

    def __init__(self, query_pos: Tensor) -> None:
        super().__init__()
        self.query_pos = query_pos

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            len(args) == 2
            and args[1] is self.query_pos
            and isinstance(args[0], Tensor)
            and "add" in getattr(func, "__name__", "")
        ):
            rows, all_rows = args[0].shape[0], self.query_pos.shape[0]
            if all_rows != 1 and rows != all_rows:
                args = (args[0], self.query_pos.narrow(0, 0, rows))
        return func(*args, **(kwargs or {}))


def opaque_layer(
    layer: nn.Module, tgt: Tensor, memory: Tensor, *, dac: LayerFlag, pre_norm: LayerFlag | None, **optional: Tensor | None
) -> Tensor:
    """A layer that overrides upstream's forward: its own code, whole, in every branch (dac over dimension 0).

    Each branch runs ``layer.forward`` with that branch's ``pre_norm`` on a shallow copy that shares all state.
    """
    given = {"tgt": tgt, "memory": memory, **{k: v for k, v in optional.items() if v is not None}}
    keys = list(given)
    lifted = _lifted(layer)

    def call(pre: bool | None, use_dac: bool) -> Callable[..., Tensor]:
        def run(*operands: Tensor) -> Tensor:
            values = dict(zip(keys, operands, strict=False))
            state = operands[len(keys) :]
            variant = shallow_copy(layer)
            if pre is not None:
                variant.pre_norm = pre  # type: ignore[assignment]
            names = inspect.signature(variant.forward).parameters
            open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())
            arguments: dict[str, Any] = {**dict.fromkeys(OPTIONAL_INPUTS), **values, "dac": use_dac}
            arguments = {k: v for k, v in arguments.items() if open_ended or k in names}
            if use_dac and "query_pos" in values:
                with _SliceQueryPos(values["query_pos"]):
                    return _called(variant, lifted, state, **arguments)
            return _called(variant, lifted, state, **arguments)

        return run

    def by_dac(pre: bool | None) -> Callable[..., Tensor]:
        if isinstance(dac, bool):
            return call(pre, dac)
        return lambda flag, *operands: branch(flag, call(pre, True), call(pre, False), *operands)

    flag_operand = () if isinstance(dac, bool) else (dac,)
    operands = (*flag_operand, *given.values(), *lifted)
    if pre_norm is None or isinstance(pre_norm, bool):
        return by_dac(pre_norm)(*operands)
    return branch(pre_norm, by_dac(True), by_dac(False), *operands)


def is_stock(layer: nn.Module, d_model: int) -> bool:
    """Whether ``fusion_layer`` is this layer's own arithmetic: decided by running both on a few numbers.

    Structure first (upstream's attributes), then a probe in every branch, so that a renamed copy of upstream's class is
    recognized and a subclass that changes anything is not. The final verification proves it at real sizes.
    """
    if any(not hasattr(layer, name) for name in _STOCK_ATTRIBUTES):
        return False
    generator = torch.Generator().manual_seed(1)
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), torch.float32)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)  # noqa: E731
    tgt, memory = make(2, 6, d_model), make(2, 3, d_model)
    positions: dict[str, Any] = {"pos": make(2, 3, d_model), "query_pos": make(2, 6, d_model)}
    masks = {
        "tgt_mask": torch.arange(6)[:, None] < torch.arange(6) - 1,
        "memory_mask": torch.arange(6)[:, None] < torch.arange(3),
        "tgt_key_padding_mask": torch.arange(6).expand(2, 6) > 3,
        "memory_key_padding_mask": torch.arange(3).expand(2, 3) > 1,
    }
    cases = ((True, False, positions), (False, False, positions), (True, True, positions), (True, False, positions | masks))
    with torch.no_grad():
        for pre, dac, extra in cases:
            try:
                own = opaque_layer(layer, tgt, memory, dac=dac, pre_norm=pre, **extra)
                ours = fusion_layer(layer, tgt, memory, dac=dac, pre_norm=pre, dac_dim=0, **extra)
            except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, NotImplementedError):
                if extra is positions:
                    return False
                continue  # attention modules need not take every mask
            if own.shape != ours.shape or not torch.allclose(own, ours, rtol=1e-4, atol=1e-5, equal_nan=True):
                return False
    return True


def made_batch_first(layer: nn.Module, d_model: int) -> bool:
    """Let a shadow take (B, N, C) where its attention is built for (N, B, C); whether it was.

    ``nn.MultiheadAttention(batch_first=False)`` has the same weights and numbers with its dimensions the other way round. A
    layer that turns its tensors round itself is left alone: what decides is that each row of a batch gives what it gives alone.

    Raises:
        SourceError: ``batch_first`` differs within the layer, so that one attention looks across the batch.
    """
    attentions = {name: child for name, child in layer.named_modules() if isinstance(child, nn.MultiheadAttention)}
    odd = [name for name, child in attentions.items() if not child.batch_first]
    if not odd or _rows_stand_alone(layer, d_model):
        return False
    for name in odd:
        attentions[name].batch_first = True
    if len(odd) < len(attentions) or not _rows_stand_alone(layer, d_model):
        raise SourceError(
            f"batch_first=False in {', '.join(odd)} of {type(layer).__name__}"
            + (f", True in {', '.join(sorted(attentions.keys() - set(odd)))}" if len(odd) < len(attentions) else "")
            + ": attention goes across the batch",
            remedy="Build every attention with batch_first=True; the weights are the same.",
        )
    return True


def _rows_stand_alone(layer: nn.Module, d_model: int) -> bool:
    generator = torch.Generator().manual_seed(1)
    shapes = {"tgt": (2, 6, d_model), "memory": (2, 3, d_model), "pos": (2, 3, d_model), "query_pos": (2, 6, d_model)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    with torch.no_grad():
        try:
            both = opaque_layer(layer, dac=False, pre_norm=None, **given)
            one = opaque_layer(layer, dac=False, pre_norm=None, **{name: value[:1] for name, value in given.items()})
        except (RuntimeError, TypeError, ValueError, AssertionError, IndexError):
            return False
    return both.shape == given["tgt"].shape and torch.allclose(both[:1], one, rtol=1e-4, atol=1e-5, equal_nan=True)
