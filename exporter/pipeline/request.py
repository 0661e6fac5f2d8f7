"""Requests for a whole model that cannot be met, refused before anything heavy is imported; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sam3x.errors import SpecError

PARTS = ("prompt_encoder", "fusion_encoder", "decoder", "mask_head")
"""Joined as ``SEGMENTER`` of ``sam3x.runtime.manifest``. A picture is encoded once, a text encoder often served elsewhere."""

ENCODER_ALONE = ("interface", "inputs", "dac_dim", "tokens", "prompt_length", "feature_sizes", "mask_dtype")
"""Fields of ``ExportSpec`` that a whole model settles itself."""


def check_pipeline(target: str, options: Mapping[str, Any], components: Sequence[str] | None, *, fuse: bool) -> None:
    """Refuse options that have no meaning for a whole model, and what cannot be joined.

    Args:
        options: what the user gave, by the names of ``sam3x.export``. components: those asked for by name; None: all.

    Raises:
        SpecError: naming the options.
    """
    if fuse and target != "onnx":
        fact = f"--fuse joins ONNX files, the target is {target}"
        raise SpecError(fact, remedy="Leave --fuse out, or take --target onnx.")
    if fuse and components is not None:
        remedy = "Leave --components out, or --fuse."
        raise SpecError("--fuse joins the components of a whole model", remedy=remedy)
    if options.get("layout", "flat") != "flat":
        remedy = "Leave --layout out."
        raise SpecError(f"--layout {options['layout']} is for one model; a pipeline has six", remedy=remedy)
    alone = [f"--{name.replace('_', '-')}" for name in ENCODER_ALONE if name in options]
    if alone:
        remedy = "Leave them out with --pipeline."
        raise SpecError(f"{', '.join(alone)} belong to a fusion encoder alone", remedy=remedy)
    if options.get("dac") is True:
        raise SpecError(
            "dac halves the batch, which counts prompts in a pipeline: self-attention would skip the second half of them",
            remedy="Take --dac runtime to keep the branch in the file, or export the fusion encoder without --pipeline.",
        )
