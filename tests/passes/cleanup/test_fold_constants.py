"""What is computed of weights at export gets a name of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from sam3x.passes.cleanup.fold_constants import FoldConstantsPass


class TwoWays(nn.Module):
    """A table read as it is and rounded, as a head for clicks in float16 reads its table of positions."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn((4, 3), generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.table, x @ self.table.to(torch.float16).to(torch.float32)


def test_a_folded_buffer_beside_the_buffer_is_two_weights_in_the_file(tmp_path: Path) -> None:
    module, x = TwoWays(), torch.eye(4)
    program = torch.export.export(module, (x,)).run_decompositions({})
    assert FoldConstantsPass().call(program).rewrites == 1
    torch.onnx.export(program, (), tmp_path / "model.onnx", dynamo=True, optimize=False, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for mine, wanted in zip(found, module(x), strict=True):
        np.testing.assert_allclose(mine, wanted.numpy(), atol=1e-6)
    assert np.abs(found[0] - found[1]).max() > 1e-5
