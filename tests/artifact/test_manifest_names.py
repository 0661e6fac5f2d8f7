"""A manifest that was written before its fields had their present names is still read."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from sam3x.artifact.manifest import ComponentSpec, Manifest, PassRecordModel

PASS: dict[str, Any] = {"name": "x", "modified": False, "rewrites": 0, "nodes_before": 1, "nodes_after": 1, "seconds": 0.0}
COMPONENT: dict[str, Any] = {"name": "decoder", "file": "decoder.onnx", "inputs": [], "outputs": [], "reads": {}, "writes": {}}
MANIFEST: dict[str, Any] = {
    "target": "onnx", "components": [], "origin": "random", "weights_sha256": "", "versions": {}, "files": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "values", "earlier", "field", "value"),
    [
        (PassRecordModel, PASS, "missed", "match_failures", [{"node": "softmax", "reason": "the scale is a tensor"}]),
        (ComponentSpec, COMPONENT, "facts", "metadata", {"delegates": 1}),
        (ComponentSpec, COMPONENT, "figures", "metrics", {"seconds": 1.5}),
        (Manifest, MANIFEST, "figures", "metrics", {"total_seconds": 1.5}),
    ],
)
def test_earlier_names_are_read(model: type[BaseModel], values: dict[str, Any], earlier: str, field: str, value: Any) -> None:
    read = model.model_validate({**values, earlier: value})
    assert read.model_dump(mode="json")[field] == value
    assert model.model_validate(read.model_dump()) == read
