"""Masks of everything: the grid, the filters and the suppression of SAM's generator, against torchvision and transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import nms

from sam3x.runtime import Clicked
from sam3x.runtime.everything import grid, suppressed


@given(seed=st.integers(0, 2**31), count=st.integers(0, 30), side=st.integers(1, 12), threshold=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_suppression_is_torchvisions(seed: int, count: int, side: int, threshold: float) -> None:
    draw = np.random.default_rng(seed)
    corners = np.sort(draw.integers(0, side + 1, (count, 2, 2)), axis=1)  # small sides: equal boxes, empty ones, exact overlaps
    boxes, scores = corners.reshape(count, 4).astype(np.float32), draw.permutation(count).astype(np.float32) / 32
    wanted = nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold)
    assert suppressed(boxes, scores, threshold).tolist() == wanted.tolist()


@pytest.mark.parametrize("side", [1, 3, 32])
def test_the_grid_is_transformers(side: int) -> None:
    from transformers.models.sam3.image_processing_sam3 import _build_point_grid

    points = np.concatenate([click.points for click in grid(side, 640, 427)])
    np.testing.assert_allclose(points, _build_point_grid(side).numpy() * [640, 427], rtol=1e-6)


def test_stability_is_transformers_measure_in_the_pictures_pixels() -> None:
    from transformers.models.sam3.image_processing_sam3 import _compute_stability_score

    small = np.random.default_rng(2).standard_normal((5, 8, 8)).astype(np.float32) * 3
    small[4] = -9
    found = Clicked(
        small_masks=small,
        border=0.5,
        logits=small,
        scores=np.zeros(5, dtype=np.float32),
        prompt=np.arange(5),
        prompts=("object",) * 5,
        picture=Image.new("RGB", (60, 41)),
    )
    stretched = torch.nn.functional.interpolate(torch.from_numpy(small)[None], (41, 60), mode="bilinear")[0]
    wanted = _compute_stability_score(stretched, 0.5, 1.5).nan_to_num(0)  # nothing at all is not stable
    assert [found.stability_score(index, 1.5) for index in range(5)] == pytest.approx(wanted.tolist(), abs=2e-3)
