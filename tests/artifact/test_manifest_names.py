"""A manifest that was written before its fields had their present names is still read."""

from __future__ import annotations

from sam3x.artifact.manifest import PassRecordModel


def test_match_failures_were_called_missed() -> None:
    counts = {"modified": False, "rewrites": 0, "nodes_before": 1, "nodes_after": 1, "seconds": 0.0}
    failure = {"node": "softmax", "reason": "the scale is a tensor"}
    record = PassRecordModel.model_validate({"name": "x", **counts, "missed": [failure]})
    assert record.match_failures[0].model_dump() == failure
    assert PassRecordModel.model_validate(record.model_dump()) == record
