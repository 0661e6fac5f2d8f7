"""``--precision fp16`` for ONNX: products in float16, what sums or places in float32, as near to eager as the emulation is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import sam3x
from sam3x import api
from sam3x.bench.runtimes import measure, write_file
from sam3x.capture.samples import Sizes, make_inputs
from sam3x.errors import SpecError, VerificationError
from sam3x.passes.precision import autocast
from sam3x.passes.precision.convert_precision import ConvertPrecisionPass
from sam3x.pipeline import export_pipeline, module_image_source
from sam3x.pipeline.compatibility import SMALL
from sam3x.sources.image import random_image_source
from sam3x.spec import checked, make_spec
from sam3x.targets.onnx.target import OnnxOptions
from support.cond_programs import capture, check_sound, evaluate, named
from support.upstream import encoder_of, run_layers

BRANCHES = [dict(zip(("dac", "pre_norm"), pair, strict=True)) for pair in itertools.product((False, True), repeat=2)]
HALF, SINGLE = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
FLOAT32_NODES = {"Softmax", "LayerNormalization", "Sin", "Cos", "Sigmoid"}
PRODUCTS = {"Gemm", "MatMul", "Conv"}


def types_of(graph: onnx.GraphProto, outer: dict[str, int]) -> list[tuple[str, int]]:
    """(operator, element type of its first output) of every node that gives floats, sub-graphs too."""
    known = dict(outer)
    known |= {item.name: item.data_type for item in graph.initializer}
    known |= {item.name: item.type.tensor_type.elem_type for item in (*graph.input, *graph.value_info, *graph.output)}
    found = []
    for node in graph.node:
        found += [(node.op_type, known.get(node.output[0], 0))]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += types_of(attribute.g, known)
    return found


@pytest.mark.parametrize("attention", ["portable", "ort", "decomposed"])
def test_an_encoder_is_as_near_as_rounding_in_every_branch(attention: str, tmp_path: Path) -> None:
    encoder = encoder_of(2)
    options: dict[str, Any] = {"precision": "fp16", "attention": attention, "attention_memory": "20KB"}
    artifact = sam3x.export(encoder, output=tmp_path / "out", **options)
    records = artifact.manifest.verification
    assert {record.branch for record in records} >= {f"dac={b['dac']} pre_norm={b['pre_norm']}" for b in BRANCHES}
    for record in records:
        assert record.passed and 1e-5 < record.rms_rel < 1.3 * record.eager_rms_rel  # type: ignore[operator]
    model = onnx.shape_inference.infer_shapes(onnx.load(artifact.path), data_prop=True)
    assert {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)} == {SINGLE, onnx.TensorProto.BOOL}
    kinds = set(types_of(model.graph, {}))
    assert {kind for name, kind in kinds if name in FLOAT32_NODES} <= {SINGLE} and ("LayerNormalization", SINGLE) in kinds
    assert {kind for name, kind in kinds if name in PRODUCTS} == {HALF}
    large = [item for item in model.graph.initializer if np.prod(item.dims) >= 256 and item.data_type == SINGLE]
    assert not large
    assert api.verify(tmp_path / "out", encoder)


@pytest.mark.parametrize("attention", ["portable", "ort", "decomposed"])
def test_masks_that_hide_everything_give_numbers(attention: str, tmp_path: Path) -> None:
    """By −∞, by the lowest float32, which float16 has not, and by padding."""
    encoder, names = encoder_of(1), ("tgt", "memory", "tgt_mask", "memory_key_padding_mask", "query_pos")
    options: dict[str, Any] = {"attention": attention, "inputs": names, "mask_dtype": "float32", "verify": "off"}
    artifact = sam3x.export(encoder, output=tmp_path / "out", precision="fp16", **options)
    given = make_inputs(
        names, make_spec(**artifact.manifest.spec), 32, Sizes(batch=2, tokens=20, prompt_length=3, padding="all"), 1
    )
    for lowest in (-float("inf"), torch.finfo(torch.float32).min):
        given["tgt_mask"][3] = lowest
        for branch in BRANCHES:
            got = artifact.run({**given, **branch})["output"]
            assert np.abs(got - run_layers(encoder.layers, given, **branch).numpy()).max() < 0.02


def test_what_overflows_is_refused_until_it_stays_in_float32(tmp_path: Path) -> None:
    encoder = encoder_of(1)
    with torch.no_grad():
        encoder.layers[0].linear1.weight.mul_(1e5)
        encoder.layers[0].linear1.bias.mul_(1e5)
        encoder.layers[0].linear2.weight.div_(1e5)
    options: dict[str, Any] = {"output": tmp_path / "out", "precision": "fp16", "dac": False, "pre_norm": "module"}
    with pytest.raises(VerificationError, match="from eager"):
        sam3x.export(encoder, **options)
    artifact = sam3x.export(encoder, **options, fp32_ops="layers.0.linear1,layers.0.linear2,*.relu")
    stored = {tuple(item.dims): item.data_type for item in onnx.load(artifact.path).graph.initializer}
    assert artifact.manifest.verified and HALF in stored.values()
    artifact = sam3x.export(encoder, **options, fp32_ops="auto")
    assert artifact.manifest.verified
    assert set(artifact.manifest.encoder.metadata["fp32_ops"]) == {"layers.0.linear1", "layers.0.linear2"}


def test_half_of_the_bytes(tmp_path: Path) -> None:
    encoder = encoder_of(1, d_model=256, num_heads=8, dim_feedforward=2048)
    options: dict[str, Any] = {"verify": "off", "branches": "select"}
    artifact = sam3x.export(encoder, output=tmp_path / "out", precision="fp16", **options)
    assert artifact.path.stat().st_size <= 0.52 * sum(value.nbytes for value in encoder.layers.parameters())


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(SpecError, match="weights"):
        checked(OnnxOptions, {"precision": "fp16", "weights": "int8"})
    with pytest.raises(SpecError, match="float32 already"):
        sam3x.export(encoder_of(1), target="onnx", fp32_ops="layer_norm", output="nowhere")
    with pytest.raises(SpecError, match="float32 already"):
        sam3x.export(encoder_of(1), target="onnx", fp32_ops="auto", output="nowhere")
    for bound in ("", "0", "-1", "nan", "inf", "much"):
        with pytest.raises(SpecError, match="no error that can be held"):
            checked(OnnxOptions, {"precision": "fp16", "fp32_ops": f"auto:{bound}"})


# ---- the graph


class Places(nn.Module):
    """Positions from whole numbers, boxes refined through logits, heads of few outputs, around products."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.mix = nn.Linear(32, 32), nn.Linear(32, 64)
        self.boxes, self.scale = nn.Linear(64, 4), nn.Parameter(torch.rand(64) + 0.5)
        self.norm = nn.LayerNorm(64)

    def forward(self, x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(x.shape[1]).float()[:, None] * 100.0 / torch.arange(1, 33)
        h = self.project(x + places.sin())
        h = nn.functional.gelu(self.mix(h)) * self.scale
        h = self.norm(h) @ self.mix.weight
        box = (self.boxes(self.mix(h)) + (reference / (1 - reference)).log()).sigmoid()
        return h, box


def test_positions_norms_and_boxes_stay_in_float32_and_products_do_not() -> None:
    module = Places().eval()
    given = (torch.randn(2, 3000, 32), torch.rand(2, 3000, 4) * 0.9 + 0.05)
    program = capture(module, given)
    convert = ConvertPrecisionPass(torch.float16, (), autocast.stays_in_float32, autocast.follows)
    assert convert.call(program).rewrites == 4
    check_sound(program)
    kinds: dict[str, set[torch.dtype]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            kinds.setdefault(str(node.target).split(".")[1], set()).add(node.meta["val"].dtype)
    assert kinds["linear"] == {torch.float16, torch.float32} and kinds["gelu"] == {torch.float16}
    for name in ("sin", "log", "sigmoid", "layer_norm", "div"):
        assert kinds[name] == {torch.float32}, name
    h, box = evaluate(program, named(program, given))
    wanted = module(*given)
    assert h.dtype is torch.float32 and (h - wanted[0]).norm() < 2e-3 * wanted[0].norm()
    assert (box - wanted[1]).abs().max() < 2e-3


# ---- pipelines


@pytest.mark.long
def test_a_component_of_a_pipeline(tiny_model: nn.Module, tmp_path: Path) -> None:
    options: dict[str, Any] = {"components": ["decoder"], "precision": "fp16"}
    manifest = export_pipeline(module_image_source(tiny_model), output=tmp_path / "out", **options)
    records = manifest.component("decoder").verification
    assert manifest.verified and all(record.passed for record in records)
    boxes = [record for record in records if record.output == "pred_boxes"]
    assert boxes and all(record.rms_rel < record.eager_rms_rel for record in boxes)  # type: ignore[operator]


@pytest.mark.long
@pytest.mark.parametrize("fuse", [False, True])
def test_a_whole_pipeline_has_eagers_masks(fuse: bool, tmp_path: Path) -> None:
    manifest = export_pipeline(random_image_source(SMALL), output=tmp_path / "out", precision="fp16", fuse=fuse)
    assert manifest.verified and manifest.quality is not None
    assert manifest.quality.precision == "fp16" and manifest.quality.min_iou > 0.99


@pytest.mark.long
def test_onnxruntime_web_runs_it(onnxruntime_web: None, tmp_path: Path) -> None:
    write_file(tmp_path / "out", "webgpu", "fp16")
    assert measure("onnxruntime-web, WASM", tmp_path / "out").off < 3e-3
