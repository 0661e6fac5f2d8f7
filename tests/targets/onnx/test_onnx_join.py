"""Joining ONNX graphs: the same numbers as the files one after another, whatever their names, sub-graphs and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sam3x.errors import LoweringError
from sam3x.targets.onnx import detect as onnx_detect
from sam3x.targets.onnx import file as onnx_file
from sam3x.targets.onnx.join import Part, join
from sam3x.targets.onnx.target import OnnxRunner

HEAD = '<ir_version: 10, opset_import: ["" : 18], metadata_props: ["by": "{by}"]>'

BRANCHES = """
branches (float[rows, 3] x, bool flag) => (float[rows, 3] y) <float[3] w = {{{w}, 1.0, 2.0}}, float[1] inner = {{1.0}}> {{
    h = Add (x, w)
    y = If (flag) <
        then_branch = once () => (float[rows, 3] a) {{ a = Mul (h, inner) }},
        else_branch = twice () => (float[rows, 3] b) {{ deep = Add (x, h)  b = Sub (deep, w) }}
    >
}}
"""
"""Unnamed nodes; branches that look at an input, a weight and an inner value of the graph around them."""

LOOP = """
steps (float[rows, 3] x, float[3] start) => (float[3] total) <float[3] w = {0.5, 0.25, 2.0}> {
    total = Scan <num_scan_inputs: int = 1, body = step (float[3] h, float[3] x_row) => (float[3] sum) {
        scaled = Mul (x_row, w)
        sum = Add (h, scaled)
    }> (start, x)
}
"""


def model(text: str, by: str = "a test") -> ir.Model:
    return ir.from_onnx_text(HEAD.format(by=by) + text)


def run(joined: ir.Model, folder: Path, inputs: dict[str, Any], *, external_data: bool = False) -> dict[str, np.ndarray]:
    onnx_file.write(joined, folder / "joined.onnx", external_data=external_data)
    return OnnxRunner(folder / "joined.onnx").run(inputs)


X = np.arange(12, dtype=np.float32).reshape(4, 3)


def branches(x: np.ndarray, flag: bool, w: float) -> np.ndarray:
    h = x + np.array([w, 1, 2], dtype=np.float32)
    return h if flag else x + h - np.array([w, 1, 2], dtype=np.float32)


@pytest.mark.parametrize("flag", [False, True])
def test_the_same_names_in_every_part_and_in_every_scope(flag: bool, tmp_path: Path) -> None:
    parts = [
        Part(name="one", model=model(BRANCHES.format(w=3.0)), writes={"y": "middle"}),
        Part(name="two", model=model(BRANCHES.format(w=5.0)), reads={"x": "middle"}, writes={"y": "end"}),
        Part(name="three", model=model(LOOP), reads={"x": "end"}),
    ]
    joined = join(parts, inputs=["x", "flag", "start"], outputs=["end", "total"], name="all")
    found = run(joined, tmp_path, {"x": X, "flag": np.array(flag), "start": np.ones(3, dtype=np.float32)})
    end = branches(branches(X, flag, 3.0), flag, 5.0)
    np.testing.assert_allclose(found["end"], end)
    np.testing.assert_allclose(found["total"], 1 + (end * [0.5, 0.25, 2]).sum(axis=0))
    proto = onnx.load(tmp_path / "joined.onnx")
    assert [item.name for item in proto.graph.input] == ["x", "flag", "start"]
    assert len({node.name for node in proto.graph.node}) == len(proto.graph.node) and all(n.name for n in proto.graph.node)
    assert proto.opset_import[0].version == 18 and proto.graph.name == "all"


def test_equal_weights_are_kept_once_and_metadata_stays(tmp_path: Path) -> None:
    parts = [
        Part(name=name, model=model(BRANCHES.format(w=3.0), by=name), reads={"x": x}, writes={"y": y})
        for name, x, y in (("one", "x", "middle"), ("two", "middle", "end"))
    ]
    joined = join(parts, inputs=["x", "flag"], outputs=["end"], name="all")
    assert len(joined.graph.initializers) == 2
    assert dict(joined.metadata_props) == {"by": "one", "two/by": "two"}
    found = run(joined, tmp_path, {"x": X, "flag": np.array(True)})
    np.testing.assert_allclose(found["end"], branches(branches(X, True, 3.0), True, 3.0))


@pytest.mark.parametrize("external", [False, True])
def test_weights_beside_the_parts_are_taken_along(external: bool, tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((300, 3), dtype=np.float32)
    parts = []
    for name, x, y in (("one", "x", "middle"), ("two", "x", "end")):
        text = "scale (float[300, 3] x) => (float[300, 3] y) <float[300, 3] w> { y = Mul (x, w) }"
        made = ir.from_onnx_text(HEAD.format(by="a test") + text, initializers=[ir.tensor(weights + (y == "end"), name="w")])
        onnx_file.write(made, tmp_path / f"{name}.onnx", external_data=True)
        assert (tmp_path / f"{name}.onnx.data").stat().st_size == weights.nbytes
        parts.append(Part(name=name, model=ir.load(tmp_path / f"{name}.onnx"), reads={"x": x}, writes={"y": y}))
    joined = join(parts, inputs=["x"], outputs=["middle", "end"], name="all")
    onnx_file.write(joined, tmp_path / "joined.onnx", external_data=external)
    for path in (*tmp_path.glob("one.*"), *tmp_path.glob("two.*")):
        path.unlink()
    assert (tmp_path / "joined.onnx.data").exists() == external
    found = OnnxRunner(tmp_path / "joined.onnx").run({"x": weights})
    np.testing.assert_array_equal(found["middle"], weights * weights)
    np.testing.assert_array_equal(found["end"], weights * (weights + 1))


def test_sizes_are_named_as_outside_and_never_alike_by_chance() -> None:
    first = "first (float[prompts, n] x) => (float[prompts, m] y) { t = Concat <axis: int = 1> (x, x)  y = Identity (t) }"
    second = "second (float[batch, length] x) => (float[batch, n] y) { inner = Identity (x)  y = Slice (inner, b, e, a) }"
    second = second.replace(
        "=> (float[batch, n] y)", "=> (float[batch, n] y) <int64[1] b = {0}, int64[1] e = {2}, int64[1] a = {1}>"
    )
    parts = [
        Part(name="first", model=model(first), writes={"y": "middle"}),
        Part(name="second", model=model(second), reads={"x": "middle"}, writes={"y": "end"}),
    ]
    parts[1].model.graph[0].outputs[0].shape = ir.Shape(["batch", "2*length + 1"])
    joined = join(parts, inputs=["x"], outputs=["end"], name="all")
    shapes = {value.name: [str(dim) for dim in value.shape or ()] for node in joined.graph for value in node.outputs}
    assert shapes["second/inner"] == ["prompts", "2*first_m + 1"]
    assert shapes["end"] == ["prompts", "second_n"]
    assert [str(dim) for dim in joined.graph.inputs[0].shape or ()] == ["prompts", "n"]


def test_an_input_that_comes_out_and_one_value_under_two_names(tmp_path: Path) -> None:
    text = "pass (float[2] x) => (float[2] x, float[2] y) { y = Neg (x) }"
    one = Part(name="one", model=model(text), writes={"x": "same", "y": "less"})
    two = Part(name="two", model=model(text), reads={"x": "less"}, writes={"x": "again", "y": "back"})
    joined = join([one, two], inputs=["x"], outputs=["same", "less", "again", "back"], name="all")
    x = np.array([1, 2], dtype=np.float32)
    found = run(joined, tmp_path, {"x": x})
    for name, wanted in {"same": x, "less": -x, "again": -x, "back": x}.items():
        np.testing.assert_array_equal(found[name], wanted)


NEG = "negative (float[2] x) => (float[2] y) { y = Neg (x) }"


@pytest.mark.parametrize(
    ("text", "reads", "options", "fact"),
    [
        ("whole (int64[2] x) => (int64[2] y) { y = Neg (x) }", {"x": "middle"}, {}, "INT64"),
        ("three (float[3] x) => (float[3] y) { y = Neg (x) }", {"x": "middle"}, {}, r"\[3\]"),
        ("flat (float[2, n] x) => (float[2, n] y) { y = Neg (x) }", {"x": "middle"}, {}, "what would feed it"),
        (NEG, {"x": "nowhere"}, {}, "nothing before it gives 'nowhere'"),
        (NEG, {"x": "middle"}, {"outputs": ["other"]}, "no part knows 'other'"),
        (NEG, {"x": "middle"}, {"outputs": ["x"]}, "'x' goes in and comes out"),
        (NEG, {"x": "middle"}, {"opset": 19}, "its opset of 'ai.onnx' is 19, the others' 18"),
        (NEG, {"x": "middle"}, {"writes": "middle"}, "'middle' is there already"),
    ],
)
def test_what_does_not_fit_is_told(text: str, reads: dict[str, str], options: dict[str, Any], fact: str) -> None:
    second = model(text)
    second.opset_imports[""] = options.get("opset", 18)
    parts = [
        Part(name="one", model=model(NEG), writes={"y": "middle"}),
        Part(name="two", model=second, reads=reads, writes={"y": options.get("writes", "end")}),
    ]
    with pytest.raises(LoweringError, match=fact):
        join(parts, inputs=["x"], outputs=options.get("outputs", ["end"]), name="all")


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.0, 1.0])
def test_select_and_collect_are_what_numpy_says(threshold: float, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    prompts, count, width = 3, 7, 4
    given = {
        "pred_logits": generator.standard_normal((prompts, count), dtype=np.float32) * 3,
        "presence": np.array([[4.0], [4.0], [-9.0]], dtype=np.float32),
        "queries": generator.standard_normal((prompts, count, width), dtype=np.float32),
        "pred_boxes": generator.random((prompts, count, 4), dtype=np.float32),
    }
    masks = "masks (float[p, k, c] kept) => (float[p, k, 2, 2] pred_masks) <int64[4] size = {0, 0, 2, 2}> "
    masks += "{ pred_masks = Reshape (kept, size) }"
    parts = [
        Part(name="select", model=onnx_detect.select()),
        Part(name="masks", model=model(masks)),
        Part(name="collect", model=onnx_detect.collect()),
    ]
    outputs = ["prompts_of", "scores_of", "boxes_of", "masks_of"]
    joined = join(parts, inputs=[*given, "threshold"], outputs=outputs, name="all")
    found = run(joined, tmp_path, {**given, "threshold": np.array([threshold], dtype=np.float32)})
    scores = 1 / (1 + np.exp(-given["pred_logits"])) / (1 + np.exp(-given["presence"]))
    rows, columns = np.nonzero(scores > threshold)
    assert (len(rows) == 0) == (threshold == 1.0) and (len(rows) == scores.size) == (threshold == 0.0)
    np.testing.assert_array_equal(found["prompts_of"], rows)
    np.testing.assert_allclose(found["scores_of"], scores[rows, columns], atol=1e-6)
    np.testing.assert_array_equal(found["boxes_of"], given["pred_boxes"][rows, columns])
    np.testing.assert_array_equal(found["masks_of"], given["queries"][rows, columns].reshape(-1, 2, 2))


def test_one_pictures_tensor_is_repeated(tmp_path: Path) -> None:
    joined = join([Part(name="r", model=onnx_detect.repeat())], inputs=["of_one", "prompt"], outputs=["of_each"], name="all")
    one = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    found = run(joined, tmp_path, {"of_one": one, "prompt": np.zeros((4, 5, 2), dtype=np.float32)})
    np.testing.assert_array_equal(found["of_each"], np.repeat(one, 4, axis=0))


def test_constants_of_a_joined_file_are_tensors(tmp_path: Path) -> None:
    """A `Constant` with `value_float` is a double to onnxslim, and float32 for ever to converters to float16."""
    part = model(
        "halves (float[rows, 3] x) => (float[rows, 3] y) { half = Constant <value_float: float = 0.5> ()  y = Mul (x, half) }"
    )
    joined = join([Part(name="a", model=part)], inputs=["x"], outputs=["y"], name="joined")
    assert [node.op_type for node in joined.graph] == ["Mul"]
    assert (run(joined, tmp_path, {"x": X})["y"] == X / 2).all()
