"""Inputs of a run against the manifest: an error names the input and what was expected, before a runtime sees anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sam3x.artifact.manifest import Manifest, TensorSpec
from sam3x.errors import ArtifactError, Step


def checked_inputs(manifest: Manifest, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays by the names of ``manifest.inputs``, in that order.

    Raises:
        ArtifactError: a name, dtype, rank or size is not what the manifest says, or dac meets an odd dimension.
    """
    if not isinstance(inputs, Mapping):
        raise ArtifactError(
            f"inputs are a {type(inputs).__name__}, expected a dict of {list(manifest.input_names)}", step=Step.RUN
        )
    names = manifest.input_names
    missing, unknown = [n for n in names if n not in inputs], [n for n in inputs if n not in names]
    if missing or unknown:
        raise ArtifactError(
            f"inputs missing {missing}, unknown {unknown}", remedy=f"This artifact takes {list(names)}.", step=Step.RUN
        )
    sizes: dict[str, int] = {}
    arrays = {}
    for spec in manifest.inputs:
        array = _array_of(spec, inputs[spec.name])
        if array.dtype != np.dtype(spec.dtype):
            raise ArtifactError(
                f"'{spec.name}' has dtype {array.dtype}, expected {spec.dtype} {list(spec.shape)}", step=Step.RUN
            )
        if array.ndim != len(spec.shape):
            raise ArtifactError(f"'{spec.name}' has shape {list(array.shape)}, expected {list(spec.shape)}", step=Step.RUN)
        for size, dim in zip(array.shape, spec.shape, strict=True):
            wanted = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
            low, high = manifest.ranges.get(str(dim), (wanted, wanted))
            if size != wanted or not low <= size <= high:
                bounds = f"; '{dim}' is {low} to {high} and the same in every input" if isinstance(dim, str) else ""
                raise ArtifactError(
                    f"'{spec.name}' has shape {list(array.shape)}, expected {list(spec.shape)}{bounds}", step=Step.RUN
                )
        arrays[spec.name] = array
    _check_dac(manifest, arrays)
    return arrays


def _array_of(spec: TensorSpec, value: Any) -> np.ndarray:
    try:
        return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:  # bfloat16, sparse, ragged lists
        kind = f"{type(value).__name__} {getattr(value, 'dtype', '')}".strip()
        fact = str(error).strip().partition("\n")[0].rstrip(".")
        raise ArtifactError(
            f"'{spec.name}' is a {kind} that gives no array ({fact}), expected {spec.dtype} {list(spec.shape)}", step=Step.RUN
        ) from error


def _check_dac(manifest: Manifest, arrays: dict[str, np.ndarray]) -> None:
    dac = bool(arrays["dac"]) if "dac" in arrays else manifest.spec.get("dac") is True
    first = manifest.input_names[0]
    size = arrays[first].shape[manifest.spec.get("dac_dim", 0)] if manifest.interface == "tokens" else arrays[first].shape[0]
    if dac and size % 2:
        raise ArtifactError(
            f"dac halves dimension {manifest.spec['dac_dim']} of '{first}', which has the odd size {size}",
            remedy="Pass dac=False.",
            step=Step.RUN,
        )
