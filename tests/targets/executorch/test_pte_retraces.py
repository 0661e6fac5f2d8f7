"""Graph passes of XNNPACK that are left out would have changed nothing: the same delegates, byte for byte."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from torch import Tensor, nn
from torch.nn import functional as F

from sam3x.targets.executorch.delegates import partitioners
from sam3x.targets.executorch.retraces import NodeByNodeProgram, passes_with_work

IMAGE, LINE, ROWS = (1, 8, 6, 6), (1, 8, 12), (1, 5, 8)


class Uses(nn.Module):
    """A function of a tensor that reads the module's layers."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


CASES: dict[str, tuple[tuple[int, ...], Uses]] = {
    "linear and relu": (ROWS, Uses(lambda m, x: F.relu(m.linear(x)), linear=nn.Linear(8, 8))),
    "linear, softmax, product": (ROWS, Uses(lambda m, x: m.linear(x).softmax(-1) @ x.mT, linear=nn.Linear(8, 8))),
    "product and bias": (ROWS, Uses(lambda m, x: torch.addmm(m.linear.bias, x[0], m.linear.weight), linear=nn.Linear(8, 8))),
    "attention": ((1, 2, 4, 8), Uses(lambda m, x: F.scaled_dot_product_attention(x, x, x, torch.zeros(4, 4)))),
    "convolution and relu": (IMAGE, Uses(lambda m, x: F.relu(m.conv(x)) * 2, conv=nn.Conv2d(8, 4, 3, padding=1))),
    "convolution of a line": (LINE, Uses(lambda m, x: m.conv(x), conv=nn.Conv1d(8, 4, 3))),
    "convolution and norm": (IMAGE, Uses(lambda m, x: m.norm(m.conv(x)), conv=nn.Conv2d(8, 4, 1), norm=nn.BatchNorm2d(4))),
    "transposed convolution": (IMAGE, Uses(lambda m, x: m.conv(x), conv=nn.ConvTranspose2d(8, 4, 2, stride=2))),
    "norm alone": (IMAGE, Uses(lambda m, x: m.norm(x), norm=nn.BatchNorm2d(8))),
    "larger picture": (IMAGE, Uses(lambda m, x: F.interpolate(x, scale_factor=2.0, mode="bilinear") + 1)),
    "pools": (IMAGE, Uses(lambda m, x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2) + x.mean((2, 3), keepdim=True))),
    "largest": (IMAGE, Uses(lambda m, x: x.max(dim=3, keepdim=True)[0] + x.amax(3, keepdim=True))),
    "two largest": (IMAGE, Uses(lambda m, x: sum(x.max(dim=3, keepdim=True)))),
    "seven tensors joined": (ROWS, Uses(lambda m, x: torch.cat([x * i for i in range(7)], 1))),
    "padded": (IMAGE, Uses(lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1))), conv=nn.Conv2d(8, 4, 3))),
    "slopes": (IMAGE, Uses(lambda m, x: m.slope(x) + m.slopes(x), slope=nn.PReLU(), slopes=nn.PReLU(8))),
    "clamped": (IMAGE, Uses(lambda m, x: F.hardtanh(m.conv(x)) + F.relu6(x), conv=nn.Conv2d(8, 8, 1))),
    "copies": (IMAGE, Uses(lambda m, x: m.conv(x.clone()).clone() + x.to(torch.float16).float(), conv=nn.Conv2d(8, 8, 1))),
    "channels last": (IMAGE, Uses(lambda m, x: m.conv(x).to(memory_format=torch.channels_last), conv=nn.Conv2d(8, 8, 1))),
    "constants": (ROWS, Uses(lambda m, x: m.linear(x) + torch.arange(8) + torch.full((8,), 2.0), linear=nn.Linear(8, 8))),
    "norm of layers": (ROWS, Uses(lambda m, x: m.norm(m.linear(x)), linear=nn.Linear(8, 8), norm=nn.LayerNorm(8))),
    "parts": (ROWS, Uses(lambda m, x: torch.stack(m.linear(x).split(4, -1)).squeeze(1), linear=nn.Linear(8, 8))),
}


def lowered(module: nn.Module, example: Tensor, *, dynamic: bool, all_passes: bool) -> bytes:
    sizes = {"x": {0: torch.export.Dim("batch", min=2, max=4)}} if dynamic else None
    program = torch.export.export(module.eval(), (example,), dynamic_shapes=sizes).run_decompositions(
        {op: rule for op, rule in torch.export.default_decompositions().items() if op is not torch.ops.aten.linear.default}
    )
    with torch.no_grad(), contextlib.nullcontext() if all_passes else passes_with_work():
        edge = to_edge_transform_and_lower(
            program if all_passes else NodeByNodeProgram.of(program),
            partitioner=partitioners("xnnpack", "fp32"),
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        return edge.to_executorch().buffer


@pytest.mark.long
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_same_file_as_with_every_pass(case: str, dynamic: bool) -> None:
    (first, *others), module = CASES[case]
    torch.manual_seed(0)
    example = torch.randn(3 if dynamic else first, *others)
    few, every = (lowered(module, example, dynamic=dynamic, all_passes=given) for given in (False, True))
    assert few == every


def test_what_was_patched_is_put_back_after_an_error() -> None:
    from executorch.backends.xnnpack import _passes

    before = _passes._transform
    with pytest.raises(RuntimeError, match="on the way"), passes_with_work():
        assert _passes._transform is not before
        raise RuntimeError("on the way")
    assert _passes._transform is before
