"""fp16 and int8 in ExecuTorch's own runtime: as far off as that precision must be and no further."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam3x
from sam3x.bench.html import bench_page
from sam3x.bench.report import command_of, make_request
from sam3x.bench.run import bench
from sam3x.bench.views import bench_markdown
from sam3x.capture.samples import Sizes, make_inputs, samples_for, thinned, verification_sizes
from sam3x.errors import SpecError
from sam3x.fusion.encoder import FusionEncoder
from sam3x.spec import make_spec
from sam3x.targets.executorch.sums import half_sums
from sam3x.verify.compare import compare
from sam3x.verify.emulate import eager_in
from sam3x.verify.products import attention, exact, half_summed
from support.folders import MadeOnce
from support.upstream import encoder_of, run_layers

BRANCHES = list(itertools.product((False, True), (False, True)))
SIZE = {"fp16": 0.52, "int8": 0.30}


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return encoder_of(1, d_model=256, num_heads=8, dim_feedforward=2048)


@pytest.fixture(scope="module", params=["fp16", "int8"])
def artifact(request: pytest.FixtureRequest, encoder: nn.Module, made_once: MadeOnce) -> sam3x.Artifact:
    options: dict[str, Any] = {"tokens": 36, "batch": (1, 2), "bundle": request.param == "int8", "precision": request.param}
    name = f"pte_{request.param}"
    return sam3x.load(made_once(name, lambda folder: sam3x.export(encoder, target="pte", output=folder, **options)))


def precision_of(artifact: sam3x.Artifact) -> str:
    return artifact.manifest.target_options["precision"]


def test_every_branch_is_as_far_from_metas_layers_as_the_precision_is(artifact: sam3x.Artifact, encoder: nn.Module) -> None:
    names = ("tgt", "memory", "memory_key_padding_mask", "query_pos")
    for batch, prompt, padding in ((1, 1, "none"), (1, 77, "some"), (2, 7, "some"), (2, 32, "all")):
        sizes = Sizes(batch=batch, tokens=36, prompt_length=prompt, padding=padding)
        inputs = make_inputs(names, make_spec(**artifact.manifest.spec), 256, sizes, seed=11)
        for dac, pre_norm in BRANCHES:
            if dac and batch % 2:
                continue
            got = torch.as_tensor(artifact.run({**inputs, "dac": dac, "pre_norm": pre_norm})["output"])
            expected = run_layers(encoder.layers, inputs, dac=dac, pre_norm=pre_norm)
            assert got.dtype is torch.float32
            allowed = {"fp16": 0.008 if half_sums("xnnpack") else 0.003, "int8": 0.03}
            assert rms(got - expected) / rms(expected) < allowed[precision_of(artifact)]


def rms(value: Tensor) -> float:
    return float(value.double().square().mean().sqrt())


def test_the_manifest_has_the_error_with_peaked_attention_too(artifact: sam3x.Artifact) -> None:
    records = artifact.manifest.verification
    assert artifact.manifest.verified and all(record.from_float64 is None for record in records)
    peaked = [record for record in records if "peaked" in record.case]
    assert {record.branch for record in peaked} == {"dac=False pre_norm=False", "dac=False pre_norm=True"}
    flat = max(record.rms_rel for record in records if record not in peaked)
    assert flat < max(record.rms_rel for record in peaked)
    if precision_of(artifact) == "int8":  # XNNPACK's int8 is the reference's, to the rounding of sums
        assert all(record.rms_rel < 1.2 * record.eager_rms_rel for record in records)


def test_the_file_shrinks_and_stays_one_delegate(artifact: sam3x.Artifact, encoder: nn.Module) -> None:
    parameters = sum(p.numel() * p.element_size() for p in encoder.layers.parameters())
    assert artifact.path.stat().st_size <= SIZE[precision_of(artifact)] * parameters
    assert artifact.manifest.metadata["delegates"] == 1 and artifact.manifest.metadata["delegated_flops"] > 0.99


@pytest.mark.parametrize("artifact", ["int8"], indirect=True)
def test_a_bundled_program_has_a_case_a_branch_that_its_own_program_passes(artifact: sam3x.Artifact) -> None:
    from executorch.devtools.bundled_program.serialize import deserialize_from_flatbuffer_to_bundled_program
    from executorch.runtime import Runtime

    path = artifact.path.with_suffix(".bpte")
    assert path.name in artifact.manifest.files
    assert artifact.manifest.metadata["bundled_cases"] == [f"dac={dac} pre_norm={pre}" for dac, pre in BRANCHES]
    bundled = deserialize_from_flatbuffer_to_bundled_program(path.read_bytes())
    assert bytes(bundled.program) == artifact.path.read_bytes()
    method = Runtime.get().load_program(bytes(bundled.program)).load_method("forward")
    (suite,) = bundled.method_test_suites
    assert suite.method_name == "forward" and len(suite.test_cases) == 4
    for case in suite.test_cases:
        inputs, (expected,) = (
            [tensor_of(item.val) for item in case.inputs],
            [tensor_of(item.val) for item in case.expected_outputs],
        )
        (got,) = method.execute(inputs)
        assert 0 < rms(got - expected) < 0.03 * rms(expected)


def tensor_of(value: Any) -> Tensor:
    dtype = {6: torch.float32, 11: torch.bool}[int(value.scalar_type)]
    return torch.frombuffer(bytearray(value.data), dtype=dtype).reshape(list(value.sizes))


def test_time_by_operator_of_a_delegate_and_of_the_portable_kernels(artifact: sam3x.Artifact) -> None:
    names = ("tgt", "memory", "memory_key_padding_mask", "query_pos")
    inputs = make_inputs(names, make_spec(), 256, Sizes(batch=1, tokens=36, prompt_length=7), seed=0)
    rows = artifact._runner.profile({**{name: value.numpy() for name, value in inputs.items()}, "dac": False, "pre_norm": True})
    calls = {row["operator"]: row["calls"] for row in rows}
    assert calls["Softmax (NC, F16)" if precision_of(artifact) == "fp16" else "Softmax (NC, F32)"] == 2 * 8
    assert any(name.startswith("portable ") for name in calls) and sum(row["share"] for row in rows) == pytest.approx(
        1, abs=0.01
    )
    assert rows == sorted(rows, key=lambda row: -row["milliseconds"])


@pytest.mark.parametrize("artifact", ["int8"], indirect=True)
def test_bench_runs_a_pte_and_shows_its_time_by_operator(artifact: sam3x.Artifact) -> None:
    request = make_request(folders=[artifact.folder], tokens="36", prompt_length=7, repeat=1, warmup=0, threads=1, profile=True)
    report = bench(request)
    (result,) = report.cases[0].results
    assert result.error is None and result.timing and result.memory and not report.failures
    assert result.options["precision"] == "int8" and result.file_bytes == artifact.path.stat().st_size and result.nodes
    assert any("QC8W" in row.operator for row in result.profile) and command_of(request).endswith("--profile")
    shown = bench_markdown(report)
    assert (
        "time by operator" in shown and result.profile[0].operator in shown and result.profile[0].operator in bench_page(report)
    )


# ---- the rule itself


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_swapped_heads_and_halved_positions_are_no_rounding(precision: str) -> None:
    right, wrong = encoder_of(1), encoder_of(1)
    with torch.no_grad():
        weight = wrong.layers[0].self_attn.in_proj_weight
        weight[:8], weight[8:16] = weight[8:16].clone(), weight[:8].clone()
    spec = make_spec(tokens=36, batch=(1, 2))
    eager = {name: FusionEncoder(encoder, spec) for name, encoder in (("right", right), ("wrong", wrong))}
    sizes = verification_sizes(spec, peaked=True)[1:]
    samples = samples_for(eager["right"].input_names, eager["right"].flag_names, spec, 32, 1, [sizes[0], sizes[-1]])

    def rounded(name: str) -> Any:
        def run(inputs: Any) -> dict[str, Tensor]:
            with eager_in(precision):
                return eager[name].eager(inputs)

        return run

    assert all(record.passed for record in compare(samples, rounded("right"), eager["right"].eager, rounded=rounded("right")))
    assert not any(
        record.passed for record in compare(samples, rounded("wrong"), eager["right"].eager, rounded=rounded("right"))
    )


@pytest.mark.parametrize("terms", [16, 256, 2048])
def test_sums_kept_in_float16_are_as_far_off_as_those_rounded_after_each_term(terms: int) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(64, terms).half().float(), torch.randn(terms, 64).half().float()
    kept = torch.zeros(64, 64, dtype=torch.float16)
    for index in range(terms):
        kept = (kept.double() + left[:, index : index + 1].double() * right[index].double()).half()
    exact = left.double() @ right.double()
    far = rms(half_summed(left, right) - exact) / rms(kept - exact)
    assert 0.8 < far < 1.5 and rms((left @ right).half() - exact) < 0.4 * rms(kept - exact)


def test_attention_in_steps_is_torchs_own() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 2, 600, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    for mask in (None, torch.rand(2, 1, 1, 9) < 0.5, torch.randn(600, 9), torch.zeros(1, 1, 1, 9, dtype=torch.bool)):
        got = attention(query, key, value, mask, 8**-0.5, lambda item: item, exact)
        torch.testing.assert_close(got, nn.functional.scaled_dot_product_attention(query, key, value, mask), equal_nan=True)


def test_tf32_rounds_the_factors_of_products_to_eleven_bits() -> None:
    one, step = torch.ones(1, 1), 2.0**-10
    near = torch.tensor([[1 + step, 1 + step / 2, 1 + 0.75 * step, 1 - step / 2]])
    with eager_in("tf32"):
        assert torch.equal(one @ near, torch.tensor([[1 + step, 1.0, 1 + step, 1 - step / 2]])) and float(near[0, 1] + 0) > 1
        assert float(nn.functional.linear(near[:, 1:2], one)) == 1.0


def test_rounding_is_that_of_the_precision_and_leaves_torch_as_it_was() -> None:
    linear, x = nn.Linear(16, 16), torch.randn(3, 16)
    weight, fast = linear.weight.detach().clone(), torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        with eager_in("fp16"):
            half = linear(x)
        expected = nn.functional.linear(x.half().float(), weight.half().float(), linear.bias.half().float()).half().float()
        assert torch.equal(half, expected)
        with eager_in("int8"):
            eighth = linear(x)
        assert 1e-4 < float((eighth - linear(x)).abs().max()) < 0.1
    assert torch.equal(linear.weight, weight) and torch.backends.mha.get_fastpath_enabled() is fast


def test_a_large_sample_runs_in_float64_only_where_float32_does_not_decide() -> None:
    spec = make_spec(tokens=4096, batch=1, dac=False, pre_norm=True, inputs=("tgt", "memory"))
    (sample, *_) = samples_for(("tgt", "memory"), (), spec, 4, 1, [Sizes(batch=1, tokens=4096, prompt_length=2)])
    seen: list[torch.dtype] = []

    def eager(inputs: Any) -> dict[str, Tensor]:
        seen.append(inputs["tgt"].dtype)
        return {"output": inputs["tgt"] * 1}

    (near,) = compare([sample], lambda inputs: {"output": inputs["tgt"] + 1e-6}, eager)
    assert near.passed and near.from_float64 is None and seen == [torch.float32]
    (far,) = compare([sample], lambda inputs: {"output": inputs["tgt"] + 1e-3}, eager)
    assert not far.passed and far.from_float64 is not None and torch.float64 in seen


def test_a_large_fixed_image_is_verified_at_both_ends_and_with_an_all_padded_image() -> None:
    sizes = verification_sizes(make_spec(tokens=5184, batch=(1, 2)))
    assert [(s.batch, s.tokens, s.prompt_length, s.padding) for s in sizes] == [(1, 5184, 7, "some"), (2, 5184, 77, "mixed")]
    assert verification_sizes(make_spec(tokens=5184, batch=1))[-1].padding == "all"

    def run(flags: tuple[str, ...]) -> list[tuple[str, int]]:
        small = [dataclasses.replace(size, tokens=4096) for size in sizes]
        samples = thinned(samples_for(("tgt", "memory", *flags), flags, make_spec(tokens=4096, batch=(1, 2)), 2, 1, small))
        return [(sample.branch, len(sample.inputs["tgt"])) for sample in samples]

    assert run(("dac",)) == [("dac=False", 1), ("dac=True", 2)]
    assert run(("pre_norm",)) == [("pre_norm=False", 1), ("pre_norm=True", 1), ("pre_norm=False", 2)]
    mask = make_inputs(
        ("memory_key_padding_mask",), make_spec(), 4, Sizes(batch=2, tokens=4, prompt_length=9, padding="mixed"), 0
    )
    assert mask["memory_key_padding_mask"].all(1).tolist() == [False, True]


# ---- delegates that cannot run here


@pytest.mark.parametrize(
    ("delegate", "precision"), [("coreml", "fp16"), pytest.param("vulkan", "fp32", marks=pytest.mark.long)]
)
def test_delegates_of_other_machines_are_built_and_said_to_be_unverified(delegate: str, precision: str, tmp_path: Path) -> None:
    level = logging.getLogger().level, logging.root.manager.disable
    options: dict[str, Any] = {"tokens": 36, "batch": (1, 2), "dac": False, "delegate": delegate, "precision": precision}
    manifest = sam3x.export(encoder_of(1, num_heads=2), target="pte", output=tmp_path / "out", **options).manifest
    assert (
        not manifest.verified and "has no " in str(manifest.verified_reason) and "sam3x verify" in str(manifest.verified_reason)
    )
    assert manifest.metadata["delegates"] <= 2 and manifest.metadata["delegated_flops"] > 0.99
    assert manifest.metadata["delegated"]["_softmax"] in (2, 4)  # one an attention, or one a head
    assert level == (logging.getLogger().level, logging.root.manager.disable)


@pytest.mark.parametrize("options", [{"precision": "int8", "delegate": "coreml"}, {"precision": "fp16", "delegate": "none"}])
def test_a_precision_its_delegate_lacks_is_refused_before_anything_is_made(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"precision .* needs another delegate than .*xnnpack"):
        sam3x.export(target="pte", output=tmp_path / "out", **options)
