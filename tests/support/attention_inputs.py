"""Inputs, of a few numbers each, for attention written as functions, and what keeps a function with its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

B, H, N, S, D = 2, 3, 5, 7, 4
ROOT = math.sqrt(D)
Styles = dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]
"""A name → the function and its inputs."""


def qkv(n: int = N, s: int = S, heads: int = H, kv_heads: int = H, batch: int = B, seed: int = 0) -> tuple[Tensor, ...]:
    """(B, H, N, D), (B, Hkv, S, D), (B, Hkv, S, D)."""
    torch.manual_seed(seed)
    return torch.randn(batch, heads, n, D), torch.randn(batch, kv_heads, s, D), torch.randn(batch, kv_heads, s, D)


def padding(batch: int = B, s: int = S) -> Tensor:
    """(B, S) bool, True = hidden; every row keeps a key."""
    mask = torch.arange(s)[None] >= torch.tensor([s - 2, s])[:batch, None]
    return mask


def bnhd(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, H, N, D) to (B, N, H, D), each in memory of its own."""
    return tuple(tensor.transpose(1, 2).contiguous() for tensor in tensors)


def soft(scores: Tensor) -> Tensor:
    """Probabilities over the keys."""
    return scores.softmax(-1)


def keeper(styles: Styles) -> Callable[..., Callable[[Callable[..., Tensor]], Callable[..., Tensor]]]:
    """A decorator that takes a function's inputs and keeps both in ``styles`` under the function's name."""

    def style(*args: Tensor) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
        def keep(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            styles[function.__name__] = (function, args)
            return function

        return keep

    return style
