"""What other tools take for granted of a graph: see the list of who reads the files, docs/onnx-tools.md."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from sam3x.targets.onnx.optimize import optimize
from sam3x.targets.onnx.target import _cast_like

HEAD = '<ir_version: 10, opset_import: ["" : 18]>'


@pytest.mark.parametrize(("sizes", "rank"), [("1", 2), ("1, 1", 2), ("1, 1, 1, 1", 4)])
def test_an_expand_to_ones_is_no_expand(sizes: str, rank: int) -> None:
    """OpenVINO drops it together with the dimensions that it adds."""
    ones, dims = f"int64[{sizes.count(',') + 1}] ones = {{{sizes}}}", ", ".join("abcd"[:rank])
    model = ir.from_onnx_text(f"{HEAD} g (float[n, 3] x) => (float[{dims}] y) <{ones}> {{ y = Expand (x, ones) }}")
    optimize(model)
    assert "Expand" not in [node.op_type for node in model.graph]
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    assert found.shape == (1,) * (rank - 2) + x.shape and (found.reshape(x.shape) == x).all()


def test_an_expand_that_repeats_stays() -> None:
    model = ir.from_onnx_text(
        f"{HEAD} g (float[n, 1] x) => (float[n, 4] y) <int64[2] sizes = {{1, 4}}> {{ y = Expand (x, sizes) }}"
    )
    optimize(model)
    assert [node.op_type for node in model.graph] == ["Expand"]


def test_what_becomes_float_follows_a_constant() -> None:
    """Converters to float16 leave a ``Cast`` to float as it is, also in a branch."""
    model = ir.from_onnx_text(
        f"""{HEAD} g (int64[n] x, bool flag) => (float[n] y) {{
            y = If (flag) <
                then_branch = one () => (float[n] a) {{ a = Cast <to: int = 1> (x) }},
                else_branch = two () => (float[n] b) {{ c = Cast <to: int = 9> (x)  b = Cast <to: int = 1> (c) }}
            >
        }}"""
    )
    _cast_like(model.graph, "like")
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    kinds = sorted(node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph))
    assert kinds == ["Cast", "CastLike", "CastLike", "If"]
    for flag, expected in ((True, [0.0, 2.0]), (False, [0.0, 1.0])):
        (found,) = ReferenceEvaluator(proto).run(None, {"x": np.array([0, 2]), "flag": np.array(flag)})
        assert found.dtype == np.float32 and found.tolist() == expected
