"""Time by operator from ONNX Runtime's profiler, with loops."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sam3x.targets.onnx.target import OnnxRunner

SIZE, ROUNDS = 256, 8


@pytest.fixture
def looped(tmp_path: Path) -> Path:
    """``x @ x`` eight times in a loop, then ``softmax``."""
    body = helper.make_graph(
        [helper.make_node("MatMul", ["held", "x"], ["next"]), helper.make_node("Identity", ["go"], ["go_on"])],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("held", TensorProto.FLOAT, [SIZE, SIZE]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [SIZE, SIZE]),
        ],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Loop", ["rounds", "true", "x"], ["product"], body=body),
            helper.make_node("Softmax", ["product"], ["y"]),
        ],
        "looped",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [SIZE, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [SIZE, SIZE])],
        [
            helper.make_tensor("rounds", TensorProto.INT64, [], [ROUNDS]),
            helper.make_tensor("true", TensorProto.BOOL, [], [True]),
        ],
    )
    path = tmp_path / "looped.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_time_of_a_node_in_a_loop_is_its_own_and_not_the_loops(looped: Path) -> None:
    rows = OnnxRunner(looped, 1).profile({"x": np.eye(SIZE, dtype=np.float32)}, runs=2)
    calls = Counter({row["operator"]: row["calls"] for row in rows})
    assert calls["MatMul"] == ROUNDS and calls["Loop"] == calls["Softmax"] == 1
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=0.01)
    assert all(row["milliseconds"] >= 0 for row in rows) and rows == sorted(rows, key=lambda row: -row["milliseconds"])
    times = {row["operator"]: row["milliseconds"] for row in rows}
    assert times["MatMul"] > times["Loop"]


def test_profiling_leaves_no_file(looped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(looped.parent)
    OnnxRunner(looped).profile({"x": np.eye(SIZE, dtype=np.float32)}, runs=1)
    assert [item.name for item in looped.parent.iterdir()] == [looped.name]
