"""The runtime's own resizing against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from sam3x.runtime.resize import resize_bilinear, resize_picture
from support.image_model import photograph


@pytest.mark.parametrize(("height", "width"), [(112, 112), (1008, 1008), (427, 200), (33, 640), (427, 640), (700, 91), (1, 1)])
def test_pictures_to_the_bit(height: int, width: int) -> None:
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("torchvision resizes 8-bit values in floats on this processor")
    picture = photograph()
    wanted = v2.Resize(size=(height, width))(v2.functional.to_image(picture)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(resize_picture(np.asarray(picture), height, width), wanted)


@pytest.mark.parametrize(("height", "width"), [(427, 640), (20, 31), (32, 32), (7, 90), (1, 1)])
def test_maps(height: int, width: int) -> None:
    maps = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.interpolate(maps[None], (height, width), mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(resize_bilinear(maps.numpy(), height, width), wanted.numpy(), atol=2e-5)
