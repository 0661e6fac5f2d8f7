"""Which components a fused pipeline joins, and the requests that cannot be; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from sam3x.errors import SpecError

PARTS = ("prompt_encoder", "fusion_encoder", "decoder", "mask_head")
"""Joined as ``SEGMENTER`` of ``sam3x.runtime.manifest``. A picture is encoded once, a text encoder often served elsewhere."""


def check_fuse(target: str, components: Sequence[str] | None) -> None:
    """Refuse what cannot be joined.

    Args:
        components: those asked for by name; None: all.

    Raises:
        SpecError: another target than ONNX, or only some components.
    """
    if target != "onnx":
        raise SpecError(f"--fuse joins ONNX files, the target is {target}", remedy="Leave --fuse out, or take --target onnx.")
    if components is not None:
        raise SpecError("--fuse joins the components of a whole model", remedy="Leave --components out, or --fuse.")
