"""``--weights fp16|int8`` for ONNX: which weights are rounded, how they are stored, and that nothing else changes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import sam3x
from sam3x import api
from sam3x.capture.samples import Sizes, make_inputs
from sam3x.errors import SpecError, VerificationError
from sam3x.precision.weights import int8_channels, rounded_weights, swapped
from sam3x.spec import checked, make_spec
from sam3x.targets.onnx import weights as onnx_weights
from sam3x.targets.onnx.target import OnnxOptions
from support.upstream import assert_equal_to_upstream, encoder_of, rounded_encoder, run_layers

PRECISIONS = ("fp16", "int8")
STORED = {"fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(value: Tensor, precision: str, axis: int = 0) -> np.ndarray:
    return (value.half().float() if precision == "fp16" else int8_channels(value, axis)).numpy()


# ---- numbers of one tensor


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (4, 3, 5, 5), (1, 300), (300, 1), (16, 16)])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_rounded_tensor_reads_back_bit_for_bit_in_any_layout(shape: tuple[int, ...], axis: int) -> None:
    value = drawn(*shape) * torch.logspace(-4, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    made = rounded(value, "int8", axis)
    step = np.abs(value.numpy()).max(axis=tuple(d for d in range(value.dim()) if d != axis), keepdims=True) / 127
    assert (np.abs(made - value.numpy()) <= 0.501 * step).all()
    for layout in (made, made.T, made[None], np.ascontiguousarray(made.reshape(shape[0], -1))):
        parts = onnx_weights.as_int8(layout)
        if layout.ndim == 2 and value.dim() > 2 and axis == 1:
            continue  # several channels in a row: stays float32, see below
        assert parts is not None and parts[0].dtype == np.int8 and np.array_equal(parts[0] * parts[1], layout)
    half = rounded(value, "fp16")
    assert np.array_equal(onnx_weights.as_half(half)[0].astype(np.float32), half)  # type: ignore[index]


def test_rows_of_a_rounded_tensor_and_empty_channels_too() -> None:
    value = drawn(96, 40)
    value[7] = 0
    made = rounded(value, "int8")
    for part in (made, made[32:64], made.T[:, :32], made * np.float32(0.25)):
        assert onnx_weights.as_int8(part) is not None


def test_what_was_not_rounded_is_not_stored_in_less() -> None:
    plain = drawn(40, 40).numpy()
    assert onnx_weights.as_int8(plain) is None and onnx_weights.as_half(plain) is None
    for wrong in (np.nan, np.inf):
        spoilt = rounded(drawn(40, 40), "int8")
        spoilt[3, 3] = wrong
        assert onnx_weights.as_int8(spoilt) is None
    assert onnx_weights.as_half(np.full((16, 16), 1e6, np.float32)) is None


# ---- nodes of a graph


def graph_of(
    nodes: list[Any], weights: dict[str, np.ndarray], x: list[Any], outputs: list[str], rank: int = 2
) -> onnx.ModelProto:
    helper = onnx.helper
    kept = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    given = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x)]
    given[0].type.tensor_type.elem_type = onnx.TensorProto.INT64 if len(x) == 1 else onnx.TensorProto.FLOAT
    results = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * rank) for name in outputs]
    graph = helper.make_graph(nodes, "g", given, results, kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


NODE = onnx.helper.make_node
KINDS: dict[str, tuple[Callable[[], list[Any]], tuple[int, ...], int, list[Any]]] = {
    "MatMul": (lambda: [NODE("MatMul", ["x", "w"], ["y"])], (20, 30), 1, ["n", 20]),
    "Gemm": (lambda: [NODE("Gemm", ["x", "w"], ["y"])], (20, 30), 1, ["n", 20]),
    "Gemm transB": (lambda: [NODE("Gemm", ["x", "w", "b"], ["y"], transB=1)], (30, 20), 0, ["n", 20]),
    "Conv": (lambda: [NODE("Conv", ["x", "w", "b"], ["y"])], (30, 4, 3, 3), 0, ["n", 4, 9, 9]),
    "ConvTranspose": (lambda: [NODE("ConvTranspose", ["x", "w"], ["y"])], (4, 30, 3, 3), 1, ["n", 4, 9, 9]),
    "Gather": (lambda: [NODE("Gather", ["w", "x"], ["y"])], (300, 8), 0, ["n"]),
}


def stored(model: onnx.ModelProto, precision: str) -> tuple[onnx.ModelProto, dict[str, Any]]:
    copied = ir.serde.deserialize_model(model)
    metadata = onnx_weights.store(copied, precision)
    made = ir.serde.serialize_model(copied)
    onnx.checker.check_model(made, full_check=True)
    return made, metadata


def outputs_of(model: onnx.ModelProto, x: np.ndarray, *, optimized: bool = True, **more: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, **more})


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_node_gives_the_same_bits(kind: str, precision: str) -> None:
    nodes, shape, axis, x = KINDS[kind]
    weights = {"w": rounded(drawn(*shape), precision, axis), "b": drawn(30, seed=1).numpy()}
    used, rank = {name for node in nodes() for name in node.input}, 4 if kind.startswith("Conv") else 2
    model = graph_of(nodes(), {name: value for name, value in weights.items() if name in used}, x, ["y"], rank)
    made, metadata = stored(model, precision)
    kept = {item.name: item.data_type for item in made.graph.initializer}
    assert STORED[precision] in kept.values() and metadata["narrow_tensors"] == 1
    assert kept.get("b", onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT
    given = np.arange(7) if len(x) == 1 else drawn(2, *x[1:], seed=2).numpy()
    for optimized in (True, False):
        assert np.array_equal(outputs_of(made, given, optimized=optimized)[0], outputs_of(model, given, optimized=optimized)[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_weight_of_several_nodes_is_converted_once(precision: str) -> None:
    nodes = [NODE("Gemm", ["x", "w"], ["a"], transB=1), NODE("MatMul", ["a", "w"], ["y"]), NODE("Identity", ["v"], ["z"])]
    kept = {"w": rounded(drawn(20, 20), precision), "v": rounded(drawn(20, 20, seed=1), precision)}
    model = graph_of(nodes, kept, ["n", 20], ["y", "z"])
    made, metadata = stored(model, precision)
    assert metadata["narrow_tensors"] == 2 and [node.op_type for node in made.graph.node].count("Cast") == 2
    for left, right in zip(outputs_of(made, np.eye(20, dtype=np.float32)), outputs_of(model, np.eye(20, dtype=np.float32))):  # noqa: B905
        assert np.array_equal(left, right)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_of_branches_and_loops_are_converted_outside(precision: str) -> None:
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    info = helper.make_tensor_value_info
    inner, outer = rounded(drawn(20, 20), precision), rounded(drawn(20, 20, seed=1), precision)
    own = [onnx.numpy_helper.from_array(inner, "inner")]
    yes = helper.make_graph([NODE("Gemm", ["x", "inner"], ["t"], transB=1)], "yes", [], [info("t", floats, [None, 20])], own)
    no = helper.make_graph([NODE("Gemm", ["x", "w"], ["f"], transB=1)], "no", [], [info("f", floats, [None, 20])])
    body = helper.make_graph(
        [NODE("MatMul", ["row", "w"], ["made"])], "body", [info("row", floats, [1, 20])], [info("made", floats, [1, 20])]
    )
    nodes = [
        NODE("If", ["flag"], ["y"], then_branch=yes, else_branch=no),
        NODE("Unsqueeze", ["y", "one"], ["rows"]),
        NODE("Scan", ["rows"], ["z"], body=body, num_scan_inputs=1),
    ]
    model = graph_of(nodes, {"w": outer, "one": np.array([1])}, ["n", 20], ["z"], 3)
    model.graph.input.append(info("flag", onnx.TensorProto.BOOL, []))
    made, metadata = stored(model, precision)
    assert metadata["narrow_tensors"] == 2 and [node.op_type for node in made.graph.node].count("Cast") == 2
    x = drawn(5, 20, seed=2).numpy()
    for flag in (True, False):
        (got,), (wanted,) = (outputs_of(item, x, flag=np.array(flag)) for item in (made, model))
        assert np.array_equal(got, wanted)


def test_what_a_caller_sees_and_what_is_small_stays(tmp_path: Path) -> None:
    big, small = rounded(drawn(20, 20), "int8"), rounded(drawn(5, 20), "int8")
    nodes = [NODE("MatMul", ["x", "w"], ["y"]), NODE("Gemm", ["x", "s"], ["z"], transB=1)]
    model = graph_of(nodes, {"w": big, "s": small}, ["n", 20], ["y", "z", "w"])
    made, metadata = stored(model, "int8")
    assert metadata == {"narrow_tensors": 0, "narrow_bytes": 0, "float32_bytes": big.nbytes + small.nbytes}
    assert made.SerializeToString() == stored(model, "fp32")[0].SerializeToString() and stored(model, "fp32")[1] == {}


# ---- which weights of a module


class Everything(nn.Module):
    """Every way a parameter may be used. What must be rounded is named ``w_…``, with the axis of its output channels."""

    def __init__(self) -> None:
        super().__init__()
        size = 24
        self.linear = nn.Linear(size, 32)
        self.norm = nn.LayerNorm((32, size))
        self.packed = nn.Parameter(drawn(3 * size, size, seed=1))
        self.raw = nn.Parameter(drawn(size, 32, seed=2))
        self.left = nn.Parameter(drawn(32, 24, seed=3))
        self.conv = nn.Conv2d(4, 32, 3)
        self.up = nn.ConvTranspose2d(4, 8, 3)
        self.words = nn.Embedding(300, size)
        self.labels = nn.Embedding(20, size)
        self.positions = nn.Parameter(drawn(16, size, seed=4))
        self.queries = nn.Parameter(drawn(16, size, seed=5))
        self.register_buffer("table", drawn(size, 32, seed=6))
        self.tied = self.linear
        self.unused = nn.Linear(size, size)

    def forward(self, x: Tensor, picture: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.packed.chunk(3)
        h = x + self.positions + self.words(ids) + self.labels(ids % 20)
        made = nn.functional.linear(h, q) + h @ k.t() + torch.einsum("bnc,ec->bne", h, v)
        asked = nn.functional.linear(self.queries, self.linear.weight)
        return (
            made,
            self.tied(h) + h @ self.raw + h @ self.table,
            asked,
            self.left @ h[0].t(),
            self.conv(picture),
            self.up(picture),
        )


AXES = {"linear.weight": 0, "packed": 0, "raw": 1, "left": 0, "conv.weight": 0, "up.weight": 1, "words.weight": 0}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_of_products_are_rounded_by_output_channel_and_nothing_else(precision: str) -> None:
    module = Everything().eval()
    with torch.no_grad():
        module.raw[0, 0] = 1e6  # beyond float16
    given = (drawn(2, 16, 24), drawn(1, 4, 6, 6), torch.arange(16)[None])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    names = {id(value): name for name, value in module.named_parameters()}

    def run() -> Any:
        with torch.no_grad():
            return module(*given)

    found = rounded_weights((module,), precision, run)
    expected = {name: axis for name, axis in AXES.items() if precision == "int8" or name != "raw"}
    assert {names[key] for key in found} == set(expected)
    for key, value in found.items():
        original = before[names[key]]
        assert np.array_equal(value.detach().numpy(), rounded(original, precision, expected[names[key]])), names[key]
    plain = run()
    with swapped((module,), found):
        assert module.linear.weight is module.tied.weight and any(item is module.tied.weight for item in found.values())
        assert not torch.equal(run()[1], plain[1])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(run(), plain, strict=True))


# ---- whole encoders

BRANCHES = [dict(zip(("dac", "pre_norm"), pair, strict=True)) for pair in itertools.product((False, True), repeat=2)]


@pytest.mark.parametrize("attention", ["portable", "ort"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_encoder_is_eager_with_rounded_weights(precision: str, attention: str, tmp_path: Path) -> None:
    encoder = encoder_of(2)
    before = copy.deepcopy(encoder.state_dict())
    options: dict[str, Any] = {"weights": precision, "attention": attention, "attention_memory": "20KB"}
    artifact = sam3x.export(encoder, output=tmp_path / "out", **options)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    spec = make_spec(**artifact.manifest.spec)
    like = rounded_encoder(encoder, spec, precision)
    names = tuple(name for name in artifact.manifest.input_names if name not in ("dac", "pre_norm"))
    for sizes in (Sizes(batch=2, tokens=61, prompt_length=9), Sizes(batch=4, tokens=300, prompt_length=3, padding="all")):
        given = make_inputs(names, spec, 32, sizes, 1)
        for branch in BRANCHES:
            got = artifact.run({**given, **branch})["output"]
            assert_equal_to_upstream(got, like.layers, given, **branch)
            wanted = run_layers(encoder.layers, given, **branch)
            far = float((torch.as_tensor(got) - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
            assert {"fp16": 1e-5, "int8": 1e-3}[precision] < far < {"fp16": 2e-3, "int8": 5e-2}[precision]
    for record in artifact.manifest.verification:
        assert record.passed and record.max_abs <= 2e-5 < record.from_unrounded  # type: ignore[operator]
        assert record.rms_rel == pytest.approx(record.eager_rms_rel, rel=0.02)
    model = onnx.load(artifact.path)
    assert {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)} == {1, 9}
    assert {item.domain: item.version for item in model.opset_import}[""] == 18
    assert [node.op_type for node in model.graph.node].count("Cast") >= 12
    assert api.verify(tmp_path / "out", encoder)


@pytest.mark.parametrize(("precision", "most"), [("fp16", 0.52), ("int8", 0.28)])
def test_the_file_shrinks_as_the_precision_does(precision: str, most: float, tmp_path: Path) -> None:
    encoder = encoder_of(1, d_model=256, num_heads=8, dim_feedforward=2048)
    options: dict[str, Any] = {"verify": "off", "branches": "select", "weights": precision}
    manifest = sam3x.export(encoder, output=tmp_path / "out", **options).manifest
    weights = sum(value.nbytes for value in encoder.layers.parameters())
    assert (tmp_path / "out" / "fusion_encoder.onnx").stat().st_size <= most * weights
    assert manifest.metadata["narrow_tensors"] == 6 and manifest.metadata["float32_bytes"] < 0.02 * weights


def test_feature_maps_and_external_data(tmp_path: Path) -> None:
    options: dict[str, Any] = {"interface": "feature_maps", "feature_sizes": ((5, 6),), "pre_norm": "per-layer"}
    artifact = sam3x.export(encoder_of(1), output=tmp_path / "out", weights="int8", external_data=True, **options)
    assert artifact.manifest.verified and "fusion_encoder.onnx.data" in artifact.manifest.files


def test_a_planted_wrong_scale_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = onnx_weights.as_int8
    monkeypatch.setattr(onnx_weights, "as_int8", lambda values: (p := right(values)) and (p[0], p[1] * np.float32(1.002)))
    with pytest.raises(VerificationError, match="from eager"):
        sam3x.export(encoder_of(1), output=tmp_path / "out", weights="int8", branches="select")
    assert not (tmp_path / "out").exists()


def test_a_precision_that_onnx_has_not_is_refused() -> None:
    with pytest.raises(SpecError, match="weights"):
        checked(OnnxOptions, {"weights": "bf16"})
