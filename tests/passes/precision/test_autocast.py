"""Boxes as they are refined stay in float32 where all else is float16."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sam3x.capture.program import run_program
from sam3x.passes.cleanup.fold_constants import FoldConstantsPass
from sam3x.passes.precision import autocast
from sam3x.passes.precision.convert_precision import ConvertPrecisionPass
from support.canonical import capture


class Refiner(nn.Module):
    """Two layers of a DETR decoder in short: sines of the boxes, a product, a head that moves the boxes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.norm, self.head = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 4)
        self.places = nn.Parameter(torch.rand(9, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        boxes = self.places.expand(x.shape[0], -1, -1)
        for _ in range(2):
            angles = (boxes[..., None] * 6.28 * 10 ** torch.arange(8).div(4)).flatten(-2)
            encoded = torch.cat((angles.sin(), angles.cos()), -1)
            x = self.norm(x + self.hidden(encoded))
            boxes = (self.head(x) + boxes.clamp(1e-3, 1 - 1e-3).logit()).sigmoid()
        return boxes, x


def test_boxes_are_float32_up_to_the_next_product() -> None:
    module, x = Refiner().eval(), torch.randn(2, 9, 64)
    program = capture(module, (x,))
    ConvertPrecisionPass(torch.float16, stays=autocast.boxes, follows=lambda _: False, inputs=True).call(program)
    FoldConstantsPass().call(program)
    program.graph_module.recompile()
    dtypes: dict[str, list[torch.dtype]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta["val"], Tensor):
            dtypes.setdefault(str(node.target).split(".")[1], []).append(node.meta["val"].dtype)
    half, whole = torch.float16, torch.float32
    assert dtypes["linear"] == [half, whole, half, whole]
    assert set(dtypes["sigmoid"]) == {whole} and set(dtypes["sin"] + dtypes["cos"]) == {whole}
    assert set(dtypes.get("native_layer_norm", []) + dtypes.get("layer_norm", [])) <= {half}
    got = run_program(program, {"x": x}, ("boxes", "values"))
    for name, wanted, atol in zip(got, module(x), (1e-3, 2e-2), strict=True):
        assert got[name].dtype is whole
        torch.testing.assert_close(got[name], wanted, atol=atol, rtol=0)


def test_small_heads_alone_stay_where_nothing_is_made_of_them() -> None:
    module = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)).eval()
    program = capture(module, (torch.randn(3, 8),))
    (head,) = autocast.boxes(program)
    assert head.meta["val"].shape == (3, 1)
