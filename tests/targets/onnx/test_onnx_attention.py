"""``--attention``: tiles of queries, ONNX Runtime's own operator, plain products; masks, sizes, memory, what the file holds."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import sam3x
from sam3x.capture.program import CapturedProgram
from sam3x.capture.samples import Sizes, make_inputs
from sam3x.errors import SpecError
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.spec import checked, make_spec
from sam3x.targets.onnx.target import OnnxOptions, OnnxTarget
from support.upstream import assert_equal_to_upstream, encoder_of

MODES = ("portable", "ort", "decomposed")
MASKS = ("none", "padding", "float padding", "bool", "float", "both", "per head")
HEADS, WIDTH = 2, 4


class Attend(nn.Module):
    """(B, H, N, D) attention, the mask as the module's second half of the interface."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3)


def make_mask(kind: str, batch: int, queries: int, keys: int, *, hidden: str = "some") -> Tensor | None:
    generator = torch.Generator().manual_seed(5)
    shapes = {"padding": (batch, 1, 1, keys), "float padding": (batch, 1, 1, keys), "both": (batch, 1, queries, keys)}
    shape = {**shapes, "per head": (batch, HEADS, queries, keys)}.get(kind, (queries, keys))
    if kind == "none":
        return None
    visible = torch.rand(shape, generator=generator) < 0.7
    visible[..., 0] = True
    if hidden == "rows":
        visible[..., :: 3 if visible.shape[-2] > 1 else 1, :] = False
    elif hidden == "all":
        visible[:] = False
    if kind.startswith("float"):
        return torch.randn(shape, generator=generator).masked_fill(~visible, float("-inf"))
    return visible


def make(batch: int, queries: int, keys: int, mask: Tensor | None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch + queries)
    sizes = {"query": queries, "key": keys, "value": keys}
    given = {name: torch.randn(batch, HEADS, size, WIDTH, generator=generator) for name, size in sizes.items()}
    return given if mask is None else {**given, "mask": mask}


@functools.cache
def captured(kind: str, dtype: torch.dtype, tokens: int, fixed: bool) -> CapturedProgram:
    """One attention with dynamic batch, queries and keys (``fixed``: 6 and 5 of them)."""
    inputs = make(3, 6, 5, make_mask(kind, 3, 6, 5))
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    dims = {"query": (0, 2), "key": (0, 2), "value": (0, 2)}
    batch, queries, keys = (torch.export.Dim(name, max=9216) for name in ("b", "n", "s"))
    by_size = {3: batch} if fixed else {3: batch, 6: queries, 5: keys}
    shapes = {
        n: {d: by_size[t.shape[d]] for d in dims.get(n, range(t.dim())) if t.shape[d] in by_size} for n, t in inputs.items()
    }
    program = torch.export.export(Attend(), tuple(inputs.values()), dynamic_shapes=shapes)
    table = torch.export.default_decompositions()
    table.pop(torch.ops.aten.scaled_dot_product_attention.default)
    program = program.run_decompositions(table)
    symbols = [str(size) for size in next(n for n in program.graph.nodes if n.name == "query").meta["val"].shape]
    key = next(n for n in program.graph.nodes if n.name == "key").meta["val"].shape
    return CapturedProgram(
        program=program,
        input_names=tuple(inputs),
        output_names=("output",),
        dim_names={symbols[0]: "batch"} | ({} if fixed else {symbols[2]: "tokens", str(key[2]): "prompt_length"}),
        samples=(),
        eager=lambda given: {"output": Attend()(**given)},
        ranges={"batch": (1, 8), "tokens": (1, tokens), "prompt_length": (1, tokens)},
    )


def lower(
    kind: str, path: Path, *, dtype: torch.dtype = torch.float32, tokens: int = 9216, fixed: bool = False, **options: Any
) -> onnx.ModelProto:
    """One attention through the ONNX target."""
    target, chosen = OnnxTarget(), checked(OnnxOptions, options)
    passes = default_pipeline().then(*target.legalization_passes(chosen))
    target.lower(passes.run(captured(kind, dtype, tokens, fixed))[0], path, chosen)
    return onnx.load(path)


def ops(model: onnx.ModelProto) -> Counter[str]:
    """Operators of a file, those of inner graphs too."""

    def walk(graph: onnx.GraphProto) -> Any:
        for node in graph.node:
            yield node.op_type
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    yield from walk(attribute.g)

    return Counter(walk(model.graph))


def run(path: Path, inputs: dict[str, Tensor]) -> Tensor:
    given = {name: value.numpy() for name, value in inputs.items()}
    return torch.from_numpy(OnnxTarget().load_runner(path).run(given)["output"])


# ---- numbers, and what the file holds

SIZES = ((1, 1, 1), (2, 5, 3), (1, 37, 7), (4, 30, 77), (2, 64, 64))


WAYS = [(mode, memory) for mode in ("portable", "ort") for memory in ("1KB", "256MB")] + [("decomposed", "256MB")]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("mode", "memory"), WAYS, ids=["-".join(way) for way in WAYS])
def test_equal_to_torch(mode: str, memory: str, mask: str, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    model = lower(mask, path, attention=mode, attention_memory=memory)
    found, domains = ops(model), {item.domain: item.version for item in model.opset_import}
    assert domains == ({"": 18, "com.microsoft": 1} if mode == "ort" else {"": 18})
    loops = {"portable": 1 if mask in ("both", "per head") else 2, "ort": mask != "none", "decomposed": 0}  # heads, then tiles
    assert found["Loop"] == loops[mode]
    assert found["MultiHeadAttention"] == (mode == "ort")
    assert found["Softmax"] == (mode != "ort")
    for batch, queries, keys in SIZES:
        for hidden in ("some", "rows", "all") if mask != "none" else ("some",):
            inputs = make(batch, queries, keys, make_mask(mask, batch, queries, keys, hidden=hidden))
            expected = Attend()(**inputs)
            assert torch.isfinite(expected).all()
            torch.testing.assert_close(run(path, inputs), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("memory", "heads"), [("1000B", 2), ("300B", 1), ("200B", 0)])
def test_heads_of_a_known_size_go_without_tiles(memory: str, heads: int, mask: str, tmp_path: Path) -> None:
    """The scores of one head take 120 bytes, half of the budget is for scores."""
    path = tmp_path / "a.onnx"
    model = lower(mask, path, fixed=True, attention_memory=memory)
    if mask not in ("both", "per head"):  # those keep the heads together
        assert ops(model)["Loop"] == (1 if heads else 2)
        assert ops(model)["ReduceProd"] == (0 if heads else 1)
    for batch in (1, 4):
        for hidden in ("some", "rows", "all") if mask != "none" else ("some",):
            inputs = make(batch, 6, 5, make_mask(mask, batch, 6, 5, hidden=hidden))
            torch.testing.assert_close(run(path, inputs), Attend()(**inputs), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_fixed_size_mask_row_and_half_precision(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    model = lower("padding", path, dtype=torch.float16, attention=mode)
    assert {v.type.tensor_type.elem_type for v in model.graph.output} == {onnx.TensorProto.FLOAT16}
    if mode != "ort":  # its CPU kernel takes float32 alone
        inputs = make(2, 9, 4, make_mask("padding", 2, 9, 4, hidden="all"))
        half = {name: value.half() if value.is_floating_point() else value for name, value in inputs.items()}
        assert (run(path, half) == 0).all()


@pytest.mark.parametrize("mode", ("portable", "ort"))
def test_scores_that_always_fit_are_not_tiled(mode: str, tmp_path: Path) -> None:
    limit = 8 * HEADS * 100 * 100 * 4
    for memory, tiled in ((f"{limit}B", False), (f"{limit - 1}B", True)):
        model = lower("padding", tmp_path / "a.onnx", tokens=100, attention=mode, attention_memory=memory)
        assert (ops(model)["Loop"] > 0) == tiled


@pytest.mark.parametrize("mask", ("none", "padding", "both"))
def test_a_tile_stays_inside_the_budget(mask: str, tmp_path: Path) -> None:
    """By ONNX Runtime's profile: what the scores of a tile take, and how many tiles there were."""
    path, budget, queries, keys = tmp_path / "a.onnx", 60_000, 301, 50
    lower(mask, path, attention="portable", attention_memory=f"{budget}B")
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = make(2, queries, keys, make_mask(mask, 2, queries, keys))
    session.run(None, {name: value.numpy() for name, value in inputs.items()})
    events = [event for event in json.loads(Path(session.end_profiling()).read_text()) if event["cat"] == "Node"]
    sizes = [int(event["args"]["output_size"]) for event in events if event["args"].get("op_name") == "Softmax"]
    assert 2 * max(sizes) <= budget and sum(sizes) >= 2 * HEADS * queries * keys * 4
    assert len(sizes) < 2 * sum(sizes) / max(sizes)  # no tile is much smaller than it may be


# ---- options


@pytest.mark.parametrize("size", ["1.5GB", "-1MB", "0MB", "MB", "256", "256 mb", "256MB ", "1TB", 256, "", "9" * 30 + "B"])
def test_a_wrong_size_is_refused(size: Any) -> None:
    with pytest.raises(SpecError, match="attention_memory"):
        checked(OnnxOptions, {"attention_memory": size})


def test_sizes_and_modes() -> None:
    sizes = {"1B": 1, "2KB": 2000, "3KiB": 3072, "256MB": 256_000_000, "1 GiB": 2**30}
    assert {s: checked(OnnxOptions, {"attention_memory": s}).attention_bytes for s in sizes} == sizes
    assert (OnnxOptions().attention, OnnxOptions().attention_bytes) == ("portable", 256_000_000)
    with pytest.raises(SpecError, match="attention"):
        checked(OnnxOptions, {"attention": "flash"})


# ---- whole encoders

CASES = [(mode, inputs) for mode in MODES for inputs in ("", "tgt,memory,tgt_mask,memory_mask,tgt_key_padding_mask,query_pos")]


@pytest.mark.parametrize(("mode", "inputs"), CASES)
def test_encoder(mode: str, inputs: str, tmp_path: Path) -> None:
    encoder = encoder_of(2)
    artifact = sam3x.export(encoder, output=tmp_path / "out", attention=mode, attention_memory="20KB", inputs=inputs)
    assert artifact.manifest.target_options["attention"] == mode
    spec = make_spec(**artifact.manifest.spec)
    names = tuple(name for name in artifact.manifest.input_names if name not in ("dac", "pre_norm"))
    for sizes in (Sizes(batch=2, tokens=61, prompt_length=9), Sizes(batch=4, tokens=33, prompt_length=3, padding="all")):
        given = make_inputs(names, spec, 32, sizes, 1)
        for branch in ({"dac": True, "pre_norm": True}, {"dac": False, "pre_norm": True}, {"dac": False, "pre_norm": False}):
            assert_equal_to_upstream(artifact.run({**given, **branch})["output"], encoder.layers, given, **branch)
    found = ops(onnx.load(artifact.path))
    assert found["Softmax"] + found["MultiHeadAttention"] == 4
    if not inputs:
        assert found["Transpose"] <= {"portable": 2 * 12, "ort": 2 * 6, "decomposed": 2 * 20}[mode]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mode", ("portable", "ort"))
def test_memory_is_linear_and_weights_stand_once(mode: str, tmp_path: Path) -> None:
    encoder = encoder_of(1, d_model=256, num_heads=8, dim_feedforward=2048)
    artifact = sam3x.export(encoder, output=tmp_path / "out", attention=mode, verify="off")
    weights = sum(p.numel() * p.element_size() for p in encoder.layers.parameters())
    assert artifact.path.stat().st_size <= 1.02 * weights
    peaks = []
    for tokens in (2304, 9216):
        command = [sys.executable, "-c", PEAK, str(artifact.path), str(tokens)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < 600e6  # the scores alone are 2.7 GB
    assert peaks[1] < 6 * peaks[0]


PEAK = """
import sys, numpy as np, onnxruntime

def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
n = int(sys.argv[2])
x, memory = np.ones((1, n, 256), np.float32), np.ones((1, 32, 256), np.float32)
flags = {"dac": np.array(False), "pre_norm": np.array(True), "memory_key_padding_mask": np.zeros((1, 32), bool)}
open("/proc/self/clear_refs", "w").write("5")
before = kilobytes("VmRSS")
session.run(None, {"tgt": x, "query_pos": x, "memory": memory, **flags})
print((kilobytes("VmHWM") - before) * 1024)
"""
