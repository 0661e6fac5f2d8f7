"""``--for``: the form each runtime runs best, and the table that says how each runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
from typer.testing import CliRunner

import sam3x
from sam3x.bench.runtimes import RUNTIMES, Measured, forms, markdown, measure, write_file
from sam3x.cli.app import app
from sam3x.errors import SpecError
from sam3x.pipeline.request import resolve
from sam3x.targets.onnx.session import checked_providers
from sam3x.targets.onnx.target import FORMS
from support.upstream import encoder_of


def operators(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from operators(attribute.g)


@pytest.mark.parametrize("runtime", [*FORMS])
def test_a_runtime_chooses_what_the_request_leaves_open(runtime: str) -> None:
    request = resolve("onnx", {"runtime": runtime})
    assert (request.options.attention, request.spec.branches) == FORMS[runtime]  # type: ignore[attr-defined]
    own = resolve("onnx", {"runtime": runtime, "attention": "portable", "branches": "cond"})
    assert (own.options.attention, own.spec.branches) == ("portable", "cond")  # type: ignore[attr-defined]
    assert resolve("onnx", own.options.model_dump()).options == own.options


def test_another_runtime_is_refused() -> None:
    with pytest.raises(SpecError, match="runtime"):
        resolve("onnx", {"runtime": "cpus"})
    assert CliRunner().invoke(app, ["export", "--for", "cpus"]).exit_code == 2


@pytest.mark.parametrize(("runtime", "attention"), [("webgpu", "MultiHeadAttention"), ("tensorrt", "Softmax")])
def test_a_device_is_given_no_loops_and_no_conditionals(runtime: str, attention: str, tmp_path: Path) -> None:
    """Every branch is verified; the sizes are such that the CPU's form has both."""
    inputs = ("tgt", "memory", "memory_key_padding_mask", "query_pos")
    options: dict[str, Any] = {"attention_memory": "20KB", "inputs": inputs}
    artifact = sam3x.export(encoder_of(1), output=tmp_path / "out", runtime=runtime, **options)
    found = Counter(operators(onnx.load(artifact.path).graph))
    assert artifact.manifest.verified and len({record.branch for record in artifact.manifest.verification}) == 4
    assert found[attention] == 2 and not {"Loop", "Scan", "If"} & set(found)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("forms")
    for runtime in forms().values():
        write_file(folder / runtime, runtime, "fp32")
    return {runtime: folder / runtime for runtime in forms().values()}


@pytest.mark.long
@pytest.mark.parametrize("runtime", ["ONNX Runtime, CPU", "OpenVINO, CPU"])
def test_every_form_runs_and_agrees(runtime: str, files: dict[str, Path]) -> None:
    for path in files.values():
        found = measure(runtime, path)
        assert found.off < 1e-5 and found.seconds > 0 and found.peak > 1 << 20


@pytest.mark.long
@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "webgpu", "coreml", "dml"])
def test_the_form_of_a_provider_runs_on_its_hardware(provider: str, tmp_path: Path) -> None:
    names = {name.removesuffix("ExecutionProvider").lower() for name in ort.get_available_providers()}
    if provider not in names:
        pytest.skip(f"this ONNX Runtime has no {provider}")
    runtime = {"dml": "directml"}.get(provider, provider)
    for precision, most in (("fp32", 5e-3), ("fp16", 2e-2)):  # GPUs may round the factors of float32 products
        write_file(tmp_path / precision, runtime, precision)
        assert measure("ONNX Runtime, CPU", tmp_path / precision, checked_providers([provider, "cpu"])).off < most


def test_the_page_has_a_cell_for_each_and_says_why_not() -> None:
    cell = Measured(off=1e-7, seconds=0.25, peak=100 << 20)
    found: dict[tuple[str, str, str], Measured | str] = {
        ("fp32", form, runtime): "RuntimeError: no" if "web" in runtime else cell for form in forms() for runtime in RUNTIMES
    }
    page = markdown(found)
    assert page.count("1e-07, 250 ms, 100 MB") == 2 * len(forms()) and "RuntimeError: no" in page
