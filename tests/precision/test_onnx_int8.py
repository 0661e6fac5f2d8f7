"""``--precision int8`` for ONNX: products in whole numbers inside conditionals and loops too, as eager emulates them."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
from PIL import Image
from torch import nn

import sam3x
from sam3x import api
from sam3x.errors import PreconditionError, SpecError, VerificationError
from sam3x.pipeline import export_pipeline, module_image_source
from sam3x.pipeline.compatibility import SMALL
from sam3x.pipeline.doctor import doctor_pipeline
from sam3x.precision.doctor import doctor
from sam3x.sources.image import random_image_source
from sam3x.targets.onnx import quantize as onnx_quantize
from sam3x.targets.onnx.calibrate import ranges_of
from sam3x.verify.emulate import eager_in
from support.upstream import encoder_of

BRANCHES = {f"dac={dac} pre_norm={pre}" for dac, pre in itertools.product((False, True), repeat=2)}


def nodes_of(graph: onnx.GraphProto, depth: int = 0) -> Iterator[tuple[int, onnx.NodeProto]]:
    for node in graph.node:
        yield depth, node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g, depth + 1)


@pytest.mark.parametrize("attention", ["portable", "ort"])
def test_an_encoder_is_the_emulation_in_every_branch(attention: str, tmp_path: Path) -> None:
    """Row by row XNNPACK is nearer; here a tensor has one scale, and the emulation too."""
    encoder = encoder_of(2)
    options: dict[str, Any] = {"precision": "int8", "attention": attention, "attention_memory": "20KB"}
    artifact = sam3x.export(encoder, output=tmp_path / "out", **options)
    records = artifact.manifest.verification
    assert {record.branch for record in records} >= BRANCHES
    for record in records:
        assert record.passed and 1e-3 < record.rms_rel < 1.1 * record.eager_rms_rel  # type: ignore[operator]
    found = list(nodes_of(onnx.load(artifact.path).graph))
    assert artifact.manifest.metadata["int8_products"] == Counter(node.op_type for _, node in found)["MatMulInteger"] == 18
    inside = Counter(node.op_type for depth, node in found if depth)
    assert inside["MatMulInteger"] == inside["DynamicQuantizeLinear"] == 4, "feed-forward blocks are in loops"
    assert "Gemm" not in {node.op_type for _, node in found} and any("VNNI" in note for note in artifact.manifest.notes)
    assert api.verify(tmp_path / "out", encoder)


def test_a_quarter_of_the_bytes(tmp_path: Path) -> None:
    encoder = encoder_of(1, d_model=256, num_heads=8, dim_feedforward=2048)
    artifact = sam3x.export(encoder, output=tmp_path / "out", precision="int8", verify="off", branches="select")
    assert artifact.path.stat().st_size <= 0.28 * sum(value.nbytes for value in encoder.layers.parameters())


def test_a_wrong_scale_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = onnx_quantize.channels
    monkeypatch.setattr(onnx_quantize, "channels", lambda values: (right(values)[0], right(values)[1] * np.float32(1.1)))
    with pytest.raises(VerificationError, match="from eager"):
        sam3x.export(encoder_of(1), output=tmp_path / "out", precision="int8", dac=False, pre_norm="module")


def test_named_linears_stay_in_float32(tmp_path: Path) -> None:
    """One of a loop, and a packed projection that is cut."""
    options: dict[str, Any] = {"precision": "int8", "verify": "off", "dac": False, "pre_norm": "module"}
    names = "layers.0.linear1,layers.0.self_attn.in_proj"
    artifact = sam3x.export(encoder_of(1), output=tmp_path / "out", fp32_ops=names, **options)
    found = Counter(node.op_type for _, node in nodes_of(onnx.load(artifact.path).graph))
    assert found["MatMulInteger"] == 9 - 4 and found["Gemm"] == 4
    with pytest.raises(PreconditionError, match="names no operation"):
        sam3x.export(encoder_of(1), output=tmp_path / "out", fp32_ops="linear9", **options)


@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
def test_numbers_and_nodes_are_those_of_onnxruntimes_quantizer(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((40, 24)).astype(np.float32), rng.standard_normal(40).astype(np.float32)
    product = (
        [onnx.helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", transB=1)]
        if kind == "Gemm"
        else [
            onnx.helper.make_node("MatMul", ["x", "w"], ["p"], "matmul"),
            onnx.helper.make_node("Add", ["p", "b"], ["y"], "a"),
        ]
    )
    values = {"w": weight if kind == "Gemm" else weight.T.copy(), "b": bias}
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        product,
        "g",
        [info("x", onnx.TensorProto.FLOAT, ["n", 24])],
        [info("y", onnx.TensorProto.FLOAT, ["n", 40])],
        [onnx.numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "theirs.onnx", per_channel=True, weight_type=QuantType.QInt8)
    mine = ir.serde.deserialize_model(model)
    assert onnx_quantize.quantize(mine)["int8_products"] == 1
    ir.save(mine, tmp_path / "mine.onnx")
    onnx.checker.check_model(str(tmp_path / "mine.onnx"), full_check=True)
    x = rng.standard_normal((7, 24)).astype(np.float32)
    got, wanted = (
        ort.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for name in ("mine.onnx", "theirs.onnx")
    )
    assert np.abs(got - wanted).max() < 1e-5
    stored = [
        [onnx.numpy_helper.to_array(item) for item in onnx.load(tmp_path / name).graph.initializer if item.data_type == 3]
        for name in ("mine.onnx", "theirs.onnx")
    ]
    theirs = next(item for item in stored[1] if item.size == weight.size)
    assert np.array_equal(stored[0][0], theirs)


class Batches:
    """As ``CalibrationDataReader``."""

    def __init__(self, batches: list[np.ndarray]) -> None:
        self.left = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(({"x": batch} for batch in self.left), None)


def test_constant_scales_are_those_of_onnxruntimes_static_quantizer(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((24, 40)).astype(np.float32)
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "matmul")],
        "g",
        [info("x", onnx.TensorProto.FLOAT, ["n", 24])],
        [info("y", onnx.TensorProto.FLOAT, ["n", 40])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "float.onnx")
    batches = [(rng.standard_normal((rows, 24)) * 3 + 1).astype(np.float32) for rows in (5, 9)]
    quantize_static(tmp_path / "float.onnx", tmp_path / "theirs.onnx", Batches(batches), per_channel=True)
    theirs = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(tmp_path / "theirs.onnx").graph.initializer}
    mine = ir.serde.deserialize_model(model)
    ranges = functools.partial(ranges_of, mine, inputs=[{"x": batch} for batch in batches], folder=tmp_path)
    assert onnx_quantize.quantize(mine, ranges)["calibrated_products"] == 1
    stored = {name: value.const_value.numpy() for name, value in mine.graph.initializers.items()}  # type: ignore[union-attr]
    assert int(stored["x_zero_point"]) - int(theirs["x_zero_point"]) == 128  # theirs is int8
    assert stored["x_scale"] == theirs["x_scale"] and not list(tmp_path.glob("tmp*"))
    ir.save(mine, tmp_path / "mine.onnx")
    onnx.checker.check_model(str(tmp_path / "mine.onnx"), full_check=True)
    session = ort.InferenceSession(tmp_path / "mine.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": batches[0]})
    scale, zero = stored["x_scale"], float(stored["x_zero_point"])
    rounded = ((batches[0] / scale + zero).round().clip(0, 255) - zero) * scale
    wanted = rounded @ (onnx_quantize.channels(weight)[0] * onnx_quantize.channels(weight)[1])
    assert np.abs(got - wanted).max() < 1e-4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("groups", "options"), [(1, {}), (1, {"strides": [2, 2], "pads": [1, 0, 1, 2]}), (32, {"dilations": [2, 1]})]
)
def test_convolutions_between_constant_scales(groups: int, options: dict[str, Any], bias: bool, tmp_path: Path) -> None:
    """Two, so that what comes out of one goes into the other; nothing of them in float32 is left in the file."""
    rng = np.random.default_rng(2)
    weights = {
        "a": rng.standard_normal((32, 32 // groups, 3, 3)),
        "b": rng.standard_normal((24, 32, 1, 1)),
        "c": rng.standard_normal(32),
    }
    names = ["x", "a", "c"] if bias else ["x", "a"]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", names, ["m"], "first", group=groups, **options),
            onnx.helper.make_node("Conv", ["m", "b"], ["y"], "second"),
        ],
        "g",
        [info("x", onnx.TensorProto.FLOAT, ["n", 32, "h", 12])],
        [info("y", onnx.TensorProto.FLOAT, ["n", 24, "i", "j"])],
        [
            onnx.numpy_helper.from_array(value.astype(np.float32), name)
            for name, value in weights.items()
            if name in [*names, "b"]
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "float.onnx")
    pictures = [{"x": (rng.standard_normal((2, 32, side, 12)) * 2 + 1).astype(np.float32)} for side in (9, 14)]
    mine = ir.serde.deserialize_model(model)
    counts = onnx_quantize.quantize(mine, functools.partial(ranges_of, mine, inputs=pictures, folder=tmp_path))
    assert counts["int8_convolutions"] == 2 and not counts["int8_products"] and counts["notes"]
    ir.save(mine, tmp_path / "mine.onnx")
    onnx.checker.check_model(str(tmp_path / "mine.onnx"), full_check=True)
    stored = onnx.load(tmp_path / "mine.onnx").graph.initializer
    assert all(math.prod(item.dims) <= 32 for item in stored if item.data_type == onnx.TensorProto.FLOAT)
    sessions = [
        ort.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"]) for name in ("float.onnx", "mine.onnx")
    ]
    wanted, got = (session.run(None, pictures[1])[0] for session in sessions)
    with torch.no_grad(), eager_in("int8", row_scales=False, int8_convolutions=True):
        tensors = {name: torch.from_numpy(value.astype(np.float32)) for name, value in weights.items()}
        padded = torch.from_numpy(pictures[1]["x"])
        top, left, bottom, right = options.get("pads", [0] * 4)
        padded = torch.nn.functional.pad(padded, (left, right, top, bottom))
        steps = {"stride": options.get("strides", 1), "dilation": options.get("dilations", 1), "groups": groups}
        first = torch.nn.functional.conv2d(padded, tensors["a"], tensors["c"] if bias else None, **steps)
        emulated = torch.nn.functional.conv2d(first, tensors["b"]).numpy()
    spread = wanted.std()
    assert 0 < np.sqrt(np.mean((got - wanted) ** 2)) < 1.3 * np.sqrt(np.mean((emulated - wanted) ** 2)) < 0.03 * spread


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return folder


def test_scales_of_a_users_pictures(pictures: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"components": ["vision_encoder"], "precision": "int8", "calibrate": str(pictures)}
    manifest = export_pipeline(random_image_source(SMALL), output=tmp_path / "out", **options)
    item = manifest.component("vision_encoder")
    assert manifest.verified and 0 < item.metadata["calibrated_products"] <= item.metadata["int8_products"]
    found = Counter(node.op_type for depth, node in nodes_of(onnx.load(tmp_path / "out" / item.file).graph) if not depth)
    assert found["QuantizeLinear"] and not found["DynamicQuantizeLinear"]
    assert found["QLinearConv"] == item.metadata["int8_convolutions"] > 0
    manifest = export_pipeline(random_image_source(SMALL), output=tmp_path / "out", fp32_ops="convolution", **options)
    item = manifest.component("vision_encoder")
    assert manifest.verified and item.metadata["int8_convolutions"] == 0 < item.metadata["int8_products"]


def test_the_doctor_ranks_what_the_file_has_in_int8(pictures: Path, tmp_path: Path) -> None:
    source = random_image_source(SMALL)
    options: dict[str, Any] = {"components": ["vision_encoder"], "precision": "int8"}
    manifest = export_pipeline(source, output=tmp_path / "out", calibrate=str(pictures), fp32_ops="auto:1e9", **options)
    item = manifest.component("vision_encoder")
    assert item.metadata["fp32_ops"] == []
    report = doctor_pipeline(source, folder=tmp_path / "out", precision="int8", bound=1e9)
    kinds = Counter(row.kind for row in report.components[0].operations)
    assert kinds["convolution"] == item.metadata["int8_convolutions"] > 0 < kinds["linear"]
    kept = f"auto:{report.components[0].max_abs * 0.9}"
    manifest = export_pipeline(source, output=tmp_path / "out", calibrate=str(pictures), fp32_ops=kept, **options)
    found = manifest.component("vision_encoder").metadata
    assert 0 < found["int8_convolutions"] < item.metadata["int8_convolutions"] and found["fp32_ops"]
    export_pipeline(source, output=tmp_path / "out", **options)
    report = doctor_pipeline(source, folder=tmp_path / "out", precision="int8", bound=1e9)
    assert {row.kind for row in report.components[0].operations} == {"linear"}


@pytest.mark.parametrize(
    ("module", "shape"), [(nn.Conv2d(64, 8, 3), (1, 64, 5, 5)), (nn.Conv2d(32, 32, 2, groups=32), (1, 32, 5, 5))]
)
def test_what_the_file_leaves_in_float32_the_emulation_leaves_too(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with torch.no_grad(), eager_in("int8", row_scales=False, int8_convolutions=True):
        got = module(x), nn.functional.linear(x, torch.ones(8, shape[-1]))
    assert torch.equal(got[0], module(x)) and torch.equal(got[1], nn.functional.linear(x, torch.ones(8, shape[-1])))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "fp16"}, "calibrate: pictures give scales of int8; add --precision int8, or leave --calibrate out"),
        ({}, "calibrate: pictures give scales of int8"),
        ({"precision": "int8", "target": "pte"}, "calibrate: no option of an export to pte"),
        ({"precision": "int8", "calibrate": "nowhere"}, "nowhere"),
    ],
)
def test_pictures_that_nothing_is_calibrated_with_are_refused(options: dict[str, Any], said: str, pictures: Path) -> None:
    with pytest.raises(SpecError, match=said):
        export_pipeline(random_image_source(SMALL), output=pictures / "out", **{"calibrate": str(pictures), **options})
    with pytest.raises(SpecError, match="a fusion encoder by itself looks at no picture"):
        sam3x.export(encoder_of(1), output=pictures / "out", precision="int8", calibrate=str(pictures))
    assert not (pictures / "out").exists()


def test_the_doctor_finds_what_int8_ruins(tmp_path: Path) -> None:
    """Two hidden features of one layer are a thousand times the others, and their scale is everybody's."""
    encoder = encoder_of(2)
    with torch.no_grad():
        encoder.layers[1].linear1.bias[:2] += 3000.0
        encoder.layers[1].linear2.weight[:, :2] *= 1e-3
    options: dict[str, Any] = {"verify": "off", "dac": False, "pre_norm": "module", "branches": "select"}
    sam3x.export(encoder, output=tmp_path / "out", **options)
    report = doctor(tmp_path / "out", encoder, precision="int8", bound=0.5, tokens=16)
    assert report.operations[0].path == "layers.1.linear2" and report.fp32_ops == ("layers.1.linear2",)
    assert {row.kind for row in report.operations} == {
        "linear"
    } and report.option == "--precision int8 --fp32-ops layers.1.linear2"
    for auto, kept in (("auto:0.5", ["layers.1.linear2"]), ("auto:1e9", [])):
        artifact = sam3x.export(encoder, output=tmp_path / "out", precision="int8", fp32_ops=auto, tokens=(2, 64), **options)
        assert artifact.manifest.encoder.metadata["fp32_ops"] == kept
        found = Counter(node.op_type for _, node in nodes_of(onnx.load(artifact.path).graph))
        assert found["MatMulInteger"] == 2 * 9 - len(kept)


def test_a_component_of_a_pipeline(tiny_model: nn.Module, tmp_path: Path) -> None:
    options: dict[str, Any] = {"components": ["text_encoder"], "precision": "int8"}
    manifest = export_pipeline(module_image_source(tiny_model), output=tmp_path / "out", **options)
    assert manifest.verified and manifest.component("text_encoder").metadata["int8_products"] > 4


@pytest.mark.long
@pytest.mark.parametrize("fuse", [False, True])
def test_a_whole_pipeline_has_nearly_eagers_masks(fuse: bool, tmp_path: Path) -> None:
    manifest = export_pipeline(random_image_source(SMALL), output=tmp_path / "out", precision="int8", fuse=fuse)
    assert manifest.verified and manifest.quality is not None
    assert manifest.quality.precision == "int8" and manifest.quality.mean_iou > 0.97
