"""Who else than ONNX Runtime reads the ONNX files: runtimes agree with it, tools leave a file that loads and agrees."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from sam3x.bench.portability import component_files, encoder_files, markdown
from sam3x.bench.tools import PORTABLE, TOOLS, attempt, try_tool, write_case
from sam3x.cli.app import app
from sam3x.sources.names import COMPONENTS

pytestmark = pytest.mark.long

RUNTIMES = ("onnx evaluator", "OpenVINO")
EXACT = ("shape inference", "version converter", "onnxslim")
OTHERS = {"float16": 1e-2, "quant_pre_process, shapes by onnx": 1e-6, "quantize_dynamic": 0.3}
ROUNDING = ("float16", "quantize_dynamic")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return encoder_files(tmp_path_factory.mktemp("files"), ("default", "select"))


def test_the_default_file_has_loops_in_loops_and_conditionals(files: dict[str, Path]) -> None:
    graph = onnx.load(files["default"] / "model.onnx").graph
    loops = [node for node in graph.node if node.op_type == "Loop"]
    inner = [node.op_type for loop in loops for node in loop.attribute[0].g.node]
    assert len(loops) == 6 and inner.count("Loop") == 4 and "If" in {node.op_type for node in graph.node}


@pytest.mark.parametrize("form", ("default", "select"))
@pytest.mark.parametrize("name", RUNTIMES)
def test_other_runtimes_agree_with_onnx_runtime(name: str, form: str, files: dict[str, Path]) -> None:
    off = attempt(name, files[form])
    assert off is not None and off <= PORTABLE


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return component_files(tmp_path_factory.mktemp("components"))


FILES = (*COMPONENTS, "fused")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", RUNTIMES)
def test_other_runtimes_read_each_component_and_the_fused_file(name: str, file: str, components: dict[str, Path]) -> None:
    """OpenVINO dropped an `Expand` to ones with its dimension, and threw on Reshape, Transpose, Reshape of a dynamic size."""
    off = attempt(name, components[file])
    assert off is not None and off <= PORTABLE


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", (*EXACT, *OTHERS))
def test_what_tools_make_of_each_component_loads_and_agrees(name: str, file: str, components: dict[str, Path]) -> None:
    """onnxslim made a double of the `value_float` of a `Constant`, float16 left a `Cast` to float in a graph of halves."""
    off = attempt(name, components[file])
    assert off is not None
    if file != "fused" or name not in ROUNDING:  # rounded scores pass the threshold: as many detections only by chance
        assert off <= OTHERS.get(name, 0.0)


@pytest.mark.parametrize("file", FILES)
def test_the_transformers_optimizer_takes_components(file: str, components: dict[str, Path]) -> None:
    """It puts what it fuses into the first sub-graph of the right name, and loses a mask that only a loop in a loop reads.

    Of a norm over channels, where its own message says it wants the last dimension, it makes one over all from the channels on.
    """
    if file == "text_encoder":
        with pytest.raises(Exception, match="topologically sorted"):
            attempt("transformers optimizer", components[file])
    else:
        off = attempt("transformers optimizer", components[file])
        assert off is not None and (off > 1e-2 if file == "interactive_head" else off <= PORTABLE)


def test_without_its_norms_the_transformers_optimizer_takes_a_head_for_clicks(
    components: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    options, make = FusionOptions("bert"), optimizer.optimize_model
    options.enable_layer_norm = False
    monkeypatch.setattr(optimizer, "optimize_model", functools.partial(make, optimization_options=options))
    off = attempt("transformers optimizer", components["interactive_head"])
    assert off is not None and off <= PORTABLE


@pytest.mark.parametrize("form", ("default", "select"))
def test_the_parser_of_tensorrt_takes_the_graph(form: str, files: dict[str, Path]) -> None:
    assert attempt("TensorRT-RTX parser", files[form]) is None


@pytest.mark.parametrize("file", COMPONENTS)
def test_the_parser_of_tensorrt_takes_each_component(file: str, components: dict[str, Path]) -> None:
    """Boxes without RoIAlign, of which TensorRT-RTX has none. The number of a fused file's detections follows from a float."""
    assert attempt("TensorRT-RTX parser", components[file]) is None


@pytest.mark.parametrize("form", ("default", "select"))
def test_onnxruntime_web_agrees_with_onnx_runtime(form: str, files: dict[str, Path], onnxruntime_web: None) -> None:
    off = attempt("onnxruntime-web", files[form])
    assert off is not None and off <= PORTABLE


@pytest.mark.parametrize("file", FILES)
def test_onnxruntime_web_reads_each_component_and_the_fused_file(
    file: str, components: dict[str, Path], onnxruntime_web: None
) -> None:
    off = attempt("onnxruntime-web", components[file])
    assert off is not None and off <= PORTABLE


@pytest.mark.parametrize("name", (*EXACT, *OTHERS))
def test_what_tools_make_of_the_default_file_loads_and_agrees(name: str, files: dict[str, Path]) -> None:
    off = attempt(name, files["default"])
    assert off is not None and off <= OTHERS.get(name, 0.0)


def test_every_component_and_the_fused_file_are_tried(components: dict[str, Path]) -> None:
    assert tuple(components) == FILES


def test_the_transformers_optimizer_takes_what_has_no_conditional(files: dict[str, Path]) -> None:
    off = attempt("transformers optimizer", files["select"])
    assert off is not None and off <= PORTABLE


def test_every_name_in_a_file_stands_for_one_thing(files: dict[str, Path]) -> None:
    def names(graph: onnx.GraphProto) -> list[str]:
        found = [f"graph {graph.name}", *(value.name for value in (*graph.input, *graph.initializer))]
        for node in graph.node:
            found += [*node.output, f"node {node.name}"]
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    found += names(attribute.g)
        return found

    for folder in files.values():
        found = names(onnx.load(folder / "model.onnx").graph)
        assert len(found) == len(set(found))


def test_a_tool_that_fails_or_crashes_costs_one_file(tmp_path: Path) -> None:
    """The reason is told, and the file after it is tried all the same."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "neg", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "neg.onnx")
    for name in ("broken", "whole"):
        write_case(tmp_path / name, tmp_path / "neg.onnx", [{"x": np.ones(2, np.float32)}])
    (tmp_path / "broken" / "model.onnx").write_bytes(b"no model")
    found = try_tool("shape inference", [tmp_path / "broken", tmp_path / "whole"])
    assert "DecodeError" in str(found[tmp_path / "broken"]) and found[tmp_path / "whole"] == 0.0


def test_the_page_has_a_cell_for_every_tool_and_a_reason_for_every_no() -> None:
    found = {name: {"default": 1e-7, "fused": 0.0} for name in TOOLS}
    found |= {
        "OpenVINO": {"default": "Error: /tmp/x/model.onnx | no", "fused": 2e-3},
        "float16": {"default": None, "fused": math.inf},
    }
    page = markdown(found)
    assert "| OpenVINO | no |" in page and "| OpenVINO | **2e-03** |" in page
    assert "OpenVINO fails on default, fused." in page and "onnxruntime-web fails" not in page
    assert "- OpenVINO, default: Error: model.onnx \\| no" in page
    assert "| float16 | reads it |" in page and "| float16 | other sizes |" in page


def test_tools_and_targets_are_two_questions(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compatibility", "--tools", "--target", "onnx", "--quiet"])
    assert done.exit_code == 2 and "--target, --tools and --runtimes are pages of their own" in done.output
