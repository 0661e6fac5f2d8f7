"""``torchvision.roi_align`` as matrix products: torchvision's numbers for every box, on every back end that lacks it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchvision  # noqa: F401 - its operator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from sam3x.capture.program import CapturedProgram, run_program
from sam3x.passes.base import count_ops
from sam3x.passes.decompose.decompose_roi_align import DecomposeRoiAlignPass
from sam3x.passes.pipeline import PassPipeline, PassRecord

ROI_ALIGN = "torchvision.roi_align.default"


class RoiAlign(nn.Module):
    """``torchvision.ops.roi_align`` with boxes that name their picture."""

    def __init__(self, bins: tuple[int, int] = (7, 7), scale: float = 1.0, ratio: int = -1, aligned: bool = False) -> None:
        super().__init__()
        self.options = (scale, *bins, ratio, aligned)

    def forward(self, x: Tensor, rois: Tensor) -> Tensor:
        return torch.ops.torchvision.roi_align(x, rois, *self.options)


class Switched(RoiAlign):
    """Inside a branch."""

    def forward(self, x: Tensor, rois: Tensor) -> Tensor:
        align = super().forward
        return torch.cond(x.sum() > 0, lambda x, rois: align(x, rois), lambda x, rois: align(-x, rois), (x, rois))


class AsManyBins(nn.Module):
    def forward(self, x: Tensor, rois: Tensor) -> Tensor:
        return torch.ops.torchvision.roi_align(x, rois, 1.0, x.shape[0], 2, 2, True)


def captured(module: nn.Module, x: Tensor, rois: Tensor, dynamic: tuple[int, ...] = ()) -> CapturedProgram:
    """``rois`` are dynamic, and so are the dimensions ``dynamic`` of ``x``."""
    shapes = (dict.fromkeys(dynamic, Dim.DYNAMIC), {0: Dim.DYNAMIC})
    with torch.no_grad():
        program = torch.export.export(module, (x, rois), dynamic_shapes=shapes).run_decompositions()
    return CapturedProgram(
        program=program,
        input_names=("x", "rois"),
        output_names=("out",),
        dim_names={},
        samples=(),
        eager=lambda given: {"out": module(*given.values())},
    )


def decomposed(before: CapturedProgram) -> tuple[CapturedProgram, PassRecord]:
    after, (record,) = PassPipeline((DecomposeRoiAlignPass(),)).run(before)
    return after, record


def ran(program: CapturedProgram, x: Tensor, rois: Tensor) -> Tensor:
    return run_program(program.program, {"x": x, "rois": rois}, ("out",))["out"]


def boxes(count: int, size: float, pictures: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """(count, 5): corners in any order, up to a picture's width outside of it."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(pictures, (count, 1), generator=generator).to(dtype)
    return torch.cat([index, (torch.rand((count, 4), generator=generator, dtype=dtype) * 3 - 1) * size], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pictures", [1, 3])
def test_the_operator_becomes_products_with_its_numbers(pictures: int, dtype: torch.dtype) -> None:
    module, x = RoiAlign(), torch.randn(pictures, 5, 9, 13, dtype=dtype)
    before = captured(module, x, boxes(4, 13, pictures, dtype))
    after, record = decomposed(before)
    assert record.modified and record.rewrites == 1 and not record.match_failures
    counts = count_ops(after.program)
    assert ROI_ALIGN not in counts and counts["aten.bmm.default"] == 2
    assert ("aten.index_select.default" in counts) == (pictures > 1)
    values = [[node.meta["val"] for node in item.program.graph.output_node().args[0]] for item in (before, after)]
    assert [(value.shape, value.dtype) for value in values[0]] == [(value.shape, value.dtype) for value in values[1]]
    for count in (1, 6, 40):
        rois = boxes(count, 13, pictures, dtype, seed=count)
        torch.testing.assert_close(ran(after, x, rois), module(x, rois), atol=1e-5, rtol=0)
    _, again = decomposed(after)
    assert not again.modified and not again.rewrites


def test_a_program_without_it_is_not_modified() -> None:
    before = captured(nn.Bilinear(3, 3, 2), torch.rand(4, 3), torch.rand(4, 3), (0,))
    after, record = decomposed(before)
    assert not record.modified and count_ops(after.program) == count_ops(before.program)


def test_branches_are_rewritten_too() -> None:
    module, x = Switched(), torch.randn(1, 3, 8, 8)
    after, record = decomposed(captured(module, x, boxes(4, 8)))
    assert record.rewrites == 2 and ROI_ALIGN not in count_ops(after.program)
    for signed in (x.abs(), -x.abs()):
        rois = boxes(6, 8, seed=2)
        torch.testing.assert_close(ran(after, signed, rois), module(signed, rois), atol=1e-5, rtol=0)


def test_pictures_and_their_size_may_be_dynamic() -> None:
    module = RoiAlign((3, 2), scale=0.5)
    after, record = decomposed(captured(module, torch.randn(4, 3, 10, 12), boxes(6, 20, 4), (0, 1, 2, 3)))
    assert record.modified
    for shape in ((4, 3, 10, 12), (2, 5, 7, 3), (1, 1, 4, 30)):
        x, rois = torch.randn(shape), boxes(5, 2 * shape[3], shape[0], seed=shape[2])
        torch.testing.assert_close(ran(after, x, rois), module(x, rois), atol=1e-5, rtol=0)


def test_bins_that_are_not_fixed_are_refused() -> None:
    before = captured(AsManyBins(), torch.randn(3, 2, 8, 8), boxes(4, 8, 3), (0,))
    after, record = decomposed(before)
    assert not record.modified and "not fixed" in record.match_failures[0].reason
    assert count_ops(after.program) == count_ops(before.program)


def test_no_bins_are_refused() -> None:
    _, record = decomposed(captured(RoiAlign((0, 2)), torch.randn(1, 2, 8, 8), boxes(4, 8)))
    assert not record.modified and record.match_failures[0].reason == "it has no bins"


EDGES = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0, 7.0, 8.0, 8.5, 9.0, 14.0, 21.0)
coordinates = st.one_of(st.sampled_from(EDGES), st.floats(-30, 60, width=32), st.floats(-300, 300, width=32))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_boxes_sizes_and_options(data: Any) -> None:
    sizes, dtype = st.integers(1, 12), data.draw(st.sampled_from([torch.float32, torch.float64]))
    module = RoiAlign(
        (data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))),
        scale=data.draw(st.sampled_from([1.0, 0.25, 1 / 3])),
        ratio=data.draw(st.integers(-1, 4)),
        aligned=data.draw(st.booleans()),
    )
    pictures = data.draw(st.integers(1, 3))
    x = torch.randn(pictures, 2, data.draw(sizes), data.draw(sizes), dtype=dtype)
    corners = st.tuples(st.integers(0, pictures - 1), *[coordinates] * 4)
    rois = torch.tensor(data.draw(st.lists(corners, min_size=2, max_size=6)), dtype=dtype)
    if module.options[4] and module.options[3] <= 0:  # torchvision raises for a box with one side turned over
        rois = torch.cat(
            [rois[:, :1], torch.minimum(rois[:, 1:3], rois[:, 3:]), torch.maximum(rois[:, 1:3], rois[:, 3:])], dim=1
        )
    after, record = decomposed(captured(module, x, rois))
    assert record.modified
    near = 1e-5 if dtype is torch.float32 else 1e-13
    torch.testing.assert_close(ran(after, x, rois), module(x, rois), atol=near, rtol=0)


def test_a_huge_box_has_all_its_samples() -> None:
    """Up to thousands a bin; torchvision's own version in Python takes no more of them than the picture has rows."""
    module, x = RoiAlign((1, 2)), torch.randn(1, 2, 8, 8)
    rois = torch.tensor([[0, -100.3, -200.7, 120.1, 180.9], [0, 3.1, -1e5, 4.2, 7e4], [0, 8, 8, 100, 100]])
    after, _ = decomposed(captured(module, x, rois))
    torch.testing.assert_close(ran(after, x, rois), module(x, rois), atol=1e-8, rtol=1e-2)
    assert ran(after, x, rois)[:2, :, :, 0].abs().min() > 0


def test_a_side_turned_over_has_no_samples() -> None:
    module, x = RoiAlign((2, 2), aligned=True), torch.randn(1, 2, 8, 8)
    rois = torch.tensor([[0.0, 5, 6, 1, 1], [0, 1, 1, 5, 6], [0, 3, 3, 3, 3]])
    after, _ = decomposed(captured(module, x, rois))
    torch.testing.assert_close(ran(after, x, rois), module(x, rois), atol=1e-5, rtol=0)
    one_side = torch.tensor([[0.0, 5, 1, 1, 6]])
    with pytest.raises(ValueError, match="max_size"):
        module(x, one_side)
    assert not ran(after, x, one_side).any()


def test_a_coordinate_that_is_no_number_is_outside() -> None:
    for ratio in (-1, 2):
        module, x = RoiAlign((2, 2), ratio=ratio), torch.randn(1, 2, 8, 8)
        rois = torch.tensor([[0, math.nan, 1, 5, 6], [0, 1, 1, 5, 6], [0, *[math.nan] * 4]])
        after, _ = decomposed(captured(module, x, rois))
        got = ran(after, x, rois)
        torch.testing.assert_close(got[1:2], module(x, rois[1:2]), atol=1e-5, rtol=0)
        assert not got[0].any() and not got[2].any()


def test_another_picture_that_is_not_finite_reaches_no_box() -> None:
    x = torch.randn(2, 2, 8, 8)
    x[1] = math.nan
    module, rois = RoiAlign((2, 2)), torch.tensor([[0.0, 1, 1, 5, 6], [1, 1, 1, 5, 6]])
    got = ran(decomposed(captured(module, x, rois))[0], x, rois)
    torch.testing.assert_close(got[:1], module(x, rois[:1]), atol=1e-5, rtol=0)
    assert got[1].isnan().all()


def test_places_in_float16_are_computed_in_float32() -> None:
    module, x = RoiAlign(ratio=2), torch.randn(1, 2, 72, 72).half()
    rois = boxes(4, 72).half()
    after, _ = decomposed(captured(module, x, rois))
    exact, got = module(x.double(), rois.double()), ran(after, x, rois)
    assert got.dtype is torch.float16
    assert (got - exact).abs().max() < 4e-3 < (module(x, rois) - exact).abs().max()
