"""Options of an export to TensorRT, and the GPUs an engine can be built for ahead of time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from sam3x.errors import SpecError
from sam3x.targets.base import AttentionMemory, Float32Operations
from sam3x.targets.triton import DESCRIPTION, Layout

CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""What TensorRT-RTX builds for without the GPU: Turing, A100, Ampere, Ada, and two of Blackwell (``ComputeCapability``)."""

DIMENSIONS = {"batch": "opt_batch", "tokens": "opt_tokens", "prompt_length": "opt_prompt_length"}
"""Dynamic dimension → the option that names the size its profile is tuned for."""


_USUAL = {"batch": 1, "tokens": 5184, "prompt_length": 32}


class TrtOptions(AttentionMemory, Float32Operations):
    """Options of an export to TensorRT.

    Attributes:
        compute_capability: the GPU an engine is for, as ``sm89``; None: the one of this machine.
        format: ``engine`` (serialized engine), ``ep`` (a ``torch.export`` program that holds the engine), ``plan-onnx`` (ONNX
            for ``trtexec``, proven to build).
        precision: of weights, products and attention. Inputs and outputs stay float32. ``tf32``: everything is float32, but the
            GPU may round the factors of products to 11 bits (``BuilderFlag.TF32``), which TensorRT by itself does.
        attention: ``layer``, which TensorRT fuses in half precision and whose inner arithmetic is then its own; ``explicit``:
            products, a softmax in float32, products, each a layer of its own. ``plan-onnx`` is always explicit.
        attention_memory: what the scores of one attention may take where it is not fused: in float32, of which
            TensorRT-RTX fuses none, and where it is explicit; not ``plan-onnx``.
        layout: ``triton``: the folder is a model repository for Triton Inference Server.
        opt_batch, opt_tokens, opt_prompt_length: the sizes the profile is tuned for.
    """

    compute_capability: str | None = Field(
        None, description="the GPU the engine is for, as sm89; left out: this machine's.", json_schema_extra={"metavar": "SM"}
    )
    format: Literal["engine", "ep", "plan-onnx"] = Field(
        "engine", description="a serialized engine, a torch program with the engine, or ONNX for trtexec."
    )
    precision: Literal["fp32", "tf32", "fp16", "bf16"] = Field("fp32", description="of weights, products and attention.")
    attention: Literal["layer", "explicit"] = Field(
        "layer", description="TensorRT's layer, fused in half precision, or products around a softmax in float32."
    )
    attention_memory: str = Field(
        "64MB", description=AttentionMemory.model_fields["attention_memory"].description, json_schema_extra={"metavar": "SIZE"}
    )
    layout: Layout = Field("flat", description=DESCRIPTION)
    opt_batch: int | None = Field(
        None, description=f"batch the profile is tuned for; left out: {_USUAL['batch']}, or the nearest in range."
    )
    opt_tokens: int | None = Field(
        None, description=f"image tokens the profile is tuned for; left out: {_USUAL['tokens']}, or the nearest."
    )
    opt_prompt_length: int | None = Field(
        None, description=f"prompt tokens the profile is tuned for; left out: {_USUAL['prompt_length']}, or the nearest."
    )

    @field_validator("compute_capability")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is None:
            return None
        name = "sm" + re.sub(r"^(sm|compute)?_?", "", value.strip().lower()).replace(".", "")
        if name not in CAPABILITIES:
            raise ValueError(f"no GPU '{value}'; TensorRT-RTX builds for {', '.join(CAPABILITIES)}")
        return name


def capability_of(name: str) -> tuple[int, int]:
    """``sm89`` → (8, 9)."""
    digits = name.removeprefix("sm")
    return int(digits[:-1]), int(digits[-1])


def optima(ranges: Mapping[str, tuple[int, int]], options: TrtOptions) -> dict[str, int]:
    """Dynamic dimension → the size its profile is tuned for.

    Raises:
        SpecError: a size outside its range.
    """
    found = {}
    for dimension, option in DIMENSIONS.items():
        if dimension not in ranges:
            continue
        low, high = ranges[dimension]
        wanted: Any = getattr(options, option)
        if wanted is not None and not low <= wanted <= high:
            raise SpecError(
                f"--{option.replace('_', '-')} {wanted} is outside {dimension} {low}:{high}",
                remedy=f"Choose a size in the range, or widen it with --{dimension.replace('_', '-')}.",
            )
        found[dimension] = min(max(_USUAL[dimension], low), high) if wanted is None else wanted
    return found
