"""The doctor of a whole model: a culprit planted in one component is found there, and what it proposes exports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sam3x.demo import WEIGHTS
from sam3x.errors import PreconditionError, SpecError
from sam3x.pipeline import export_pipeline, module_image_source, transformers_image_source
from sam3x.pipeline.compatibility import SMALL
from sam3x.pipeline.doctor import doctor_pipeline
from sam3x.pipeline.request import resolve_pipeline
from sam3x.precision.doctor_report import PipelineDoctorReport
from sam3x.precision.doctor_views import doctor_page, doctor_view
from sam3x.sources.image import draw_image_weights
from sam3x.sources.image_model import build_image_model
from support.command_line import run

VISION, HEAD = "vision_encoder", "mask_head"
CULPRIT = "backbone.vision_backbone.trunk.blocks.1.mlp"


def planted() -> nn.Module:
    """The hidden activations of the ViT's last layer are beyond fp16, and its second linear brings them back."""
    model: Any = build_image_model(SMALL)
    draw_image_weights(model, 3)
    mlp = model.backbone.vision_backbone.trunk.blocks[1].mlp
    with torch.no_grad():
        mlp.fc1.weight.mul_(1e5)
        mlp.fc1.bias.fill_(1e5)  # on the straight part of gelu
        mlp.fc2.weight.div_(1e5)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return planted()


@pytest.fixture(scope="module")
def report(model: nn.Module) -> PipelineDoctorReport:
    return doctor_pipeline(module_image_source(model), components=[VISION, HEAD], image_size=56)


def test_the_culprit_is_found_in_its_component_and_nowhere_else(report: PipelineDoctorReport) -> None:
    vision, head = report.components
    assert (vision.component, head.component) == (VISION, HEAD) and vision.scaled and math.isinf(vision.max_abs)
    assert {CULPRIT + ".fc1", CULPRIT + ".fc2"} <= set(vision.fp32_ops) and vision.max_abs_with_fp32_ops <= vision.bound
    assert head.fp32_ops == ()
    assert all(f"{VISION}:{name}" in report.option for name in vision.fp32_ops)


def test_the_report_as_table_and_page(report: PipelineDoctorReport) -> None:
    page = doctor_page(report.components)
    assert page.count("<h2>") >= 4 and f"--fp32-ops {VISION}:" in page and "<script" not in page
    assert doctor_view(report.components)
    assert PipelineDoctorReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.long
def test_its_proposal_exports(report: PipelineDoctorReport, model: nn.Module, tmp_path: Path) -> None:
    fp32_ops = report.option.partition("--fp32-ops ")[2]
    made = export_pipeline(
        module_image_source(model),
        output=tmp_path,
        components=[VISION, HEAD],
        precision="fp16",
        fp32_ops=fp32_ops,
        image_size=56,
    )
    assert made.verified


@pytest.mark.long
def test_what_must_stay_is_measured_in_the_export(model: nn.Module, tmp_path: Path) -> None:
    options: dict[str, Any] = {"components": [VISION, HEAD], "precision": "fp16", "image_size": 56}
    made = export_pipeline(module_image_source(model), output=tmp_path, fp32_ops="auto", **options)
    kept = {item.name: set(item.metadata["fp32_ops"]) for item in made.components}
    assert made.verified and {CULPRIT + ".fc1", CULPRIT + ".fc2"} <= kept[VISION] and not kept[HEAD]


@pytest.mark.long
def test_a_name_of_several_components_need_not_be_in_each_and_must_be_in_one(model: nn.Module, tmp_path: Path) -> None:
    options: dict[str, Any] = {"components": [VISION, HEAD], "precision": "fp16", "verify": "off", "image_size": 56}
    blocks = "backbone.vision_backbone.trunk.blocks.1"  # the mask head has none
    export_pipeline(module_image_source(model), output=tmp_path, fp32_ops=f"{blocks},{HEAD}:layer_norm", **options)
    for name, fact in (("no_such_kind", "of any component"), (f"{HEAD}:{blocks}", "names no operation of this graph")):
        with pytest.raises(PreconditionError, match=fact):
            export_pipeline(module_image_source(model), output=tmp_path, fp32_ops=name, **options)
    with pytest.raises(SpecError, match="of no component of this export"):
        resolve_pipeline("onnx", {"precision": "fp16", "fp32_ops": "decoder:attention"}, components=[VISION])


def test_the_command() -> None:
    done = run("doctor", "--pipeline", "--demo", "--components", "text_encoder", "--json")
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["components"]
    assert found["component"] == "text_encoder" and found["operations"]


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ([], "there is nothing to examine"),
        (["--pipeline", "--tokens", "16"], "--tokens belongs to an encoder by itself"),
        (["--pipeline", "--components", "eyes"], "no component eyes"),
        (["--pipeline", "--bound", "0"], "no error anything can hold"),
    ],
)
def test_wrong_options_are_sentences(options: list[str], fact: str) -> None:
    done = run("doctor", *options)
    assert done.exit_code == 2 and fact in " ".join(done.stderr.split())


def test_options_of_a_pipeline_with_an_encoders_folder(default_artifact: Path) -> None:
    for options, fact in ((["--image-size", "56"], "belongs to a pipeline"), (["--pipeline"], "holds a fusion encoder alone")):
        done = run("doctor", str(default_artifact), *options)
        assert done.exit_code == 2 and fact in " ".join(done.stderr.split())


def test_an_exported_pipeline_is_examined_with_its_own_weights(tmp_path: Path) -> None:
    source = transformers_image_source(WEIGHTS)
    export_pipeline(source, output=tmp_path, components=["text_encoder"], verify="off")
    (found,) = doctor_pipeline(source, folder=tmp_path, precision="bf16").components
    assert found.component == "text_encoder" and found.fp32_ops == ()
    done = run("doctor", tmp_path)
    assert done.exit_code == 2 and "was exported from other weights" in " ".join(done.stderr.split())
