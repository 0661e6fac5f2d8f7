"""Exports beside torch's own in one process."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import sam3x
from support.upstream import encoder_of


def test_an_export_after_torchs_own_in_the_same_process(tmp_path: Path) -> None:
    """torch.onnx.export leaves an Opset in onnxscript's shared rules, after which they could not be copied."""
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).eval()
    torch.onnx.export(convolution, (torch.randn(1, 3, 8, 8),), tmp_path / "plain.onnx", dynamo=True, verbose=False)
    artifact = sam3x.export(encoder_of(1), output=tmp_path / "out", dac=False, pre_norm="module")
    assert artifact.manifest.verified
    torch.onnx.export(convolution, (torch.randn(1, 3, 8, 8),), tmp_path / "again.onnx", dynamo=True, verbose=False)
    assert (tmp_path / "again.onnx").stat().st_size == (tmp_path / "plain.onnx").stat().st_size
