"""Code bound to float32, run in float64."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sam3x.fusion.wide import wide_floats

TABLE = torch.randn(4, 4)
CODE: dict[str, Callable[[Tensor], Tensor]] = {
    "float32-softmax": lambda x: x.softmax(-1, dtype=torch.float32) @ x,
    "functional-softmax": lambda x: functional.softmax(x, -1, dtype=torch.float32) @ x,
    "one-hot": lambda x: functional.one_hot(torch.arange(4).flip(0), 4).float() @ x,
    "scores-in-float32": lambda x: x.float().softmax(-1) @ x,
    "to": lambda x: x.to(torch.float32) @ x.to(dtype=torch.float) @ x.type(torch.float32),
    "factory": lambda x: torch.linspace(0, 1, 4) @ x + torch.zeros(4, dtype=torch.float32) @ x,
    "written-into": lambda x: torch.empty(4, 4).copy_(x).add_(x) @ x,
    "rows-written": lambda x: _rows_written(x),
    "a-table-of-its-own": lambda x: TABLE @ x + functional.linear(x, TABLE),
    "attention": lambda x: functional.scaled_dot_product_attention(x[None], TABLE[None], x[None]),
    "rotary": lambda x: torch.view_as_real(
        torch.view_as_complex(x.float().reshape(4, 2, 2)) * torch.polar(torch.ones(4, 2), TABLE[:, :2])
    ).flatten(1),
}  # fmt: skip


def _rows_written(x: Tensor) -> Tensor:
    made = torch.zeros(4, 4)
    made[1:3] = x[1:3]
    return made @ x


@pytest.mark.parametrize("name", CODE)
def test_code_bound_to_float32_takes_part_in_a_float64_run(name: str) -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        single = CODE[name](x.float())
        with wide_floats():
            double = CODE[name](x)
    assert double.dtype is torch.float64 and single.dtype is torch.float32
    torch.testing.assert_close(double.float(), single, atol=1e-5, rtol=1e-5)
    assert (double - double.float().double()).abs().max() > 0  # nothing was rounded on the way out


def test_another_thread_and_what_comes_after_are_as_they_were() -> None:
    found: list[torch.dtype] = []
    with wide_floats():
        thread = threading.Thread(target=lambda: found.append(torch.ones(2).float().dtype))
        thread.start()
        thread.join()
    assert found == [torch.float32] and torch.ones(2, dtype=torch.float64).float().dtype is torch.float32
