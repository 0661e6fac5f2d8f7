"""The precision doctor: a planted culprit is found, the operations it keeps in float32 hold the bound, and no fewer do."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from sam3x.capture.capture import capture
from sam3x.capture.program import run_program
from sam3x.cli.app import app
from sam3x.errors import VerificationError
from sam3x.passes.attention.simplify_attention_masks import SimplifyAttentionMasksPass
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.passes.precision.convert_precision import ConvertPrecisionPass
from sam3x.precision.attention import emulated_attention
from sam3x.precision.doctor import Probe, examine, fewest_fp32_ops
from sam3x.precision.doctor_report import BOUNDS, DoctorReport
from sam3x.precision.doctor_views import doctor_page, doctor_view
from sam3x.spec import make_spec
from sam3x.targets.tensorrt.check import distance
from support.upstream import encoder_of

CULPRIT = 3
BRANCHES = {f"dac={dac} pre_norm={pre}" for dac, pre in itertools.product((False, True), repeat=2)}


def planted(num_layers: int = 6) -> nn.Module:
    """Six layers; the hidden activations of one are beyond fp16, and its second linear brings them back."""
    encoder = encoder_of(num_layers)
    with torch.no_grad():
        encoder.layers[CULPRIT].linear1.weight.mul_(1e5)
        encoder.layers[CULPRIT].linear1.bias.mul_(1e5)
        encoder.layers[CULPRIT].linear2.weight.div_(1e5)
    return encoder


def probe_of(encoder: nn.Module, dtype: torch.dtype) -> Probe:
    captured = capture(encoder, make_spec(branches="select", tokens=16, batch=(1, 2), prompt_length=5))
    program, _ = default_pipeline("select").then(SimplifyAttentionMasksPass()).run(captured)
    return Probe(program, program.samples, dtype)


@pytest.fixture(scope="module")
def report() -> DoctorReport:
    probe = probe_of(planted(), torch.float16)
    found = examine(probe, precision="fp16", bound=BOUNDS["fp16"], origin="planted")
    # what the doctor promises is what the pass that the target runs gives, in the same branches
    program, _ = default_pipeline("select").run(probe.program)
    program, _ = type(default_pipeline())((ConvertPrecisionPass(torch.float16, found.fp32_ops),)).run(program)
    for sample, expected in zip(probe.samples, probe.expected, strict=True):
        got = run_program(program.program, sample.inputs, program.output_names)["output"]
        assert distance(got, expected["output"])["max_abs"] <= found.max_abs_with_fp32_ops * 1.5
    return found


def test_the_planted_culprit_is_found_in_every_branch(report: DoctorReport) -> None:
    assert set(report.branches) == BRANCHES
    assert math.isinf(report.max_abs)
    assert {row.path for row in report.operations[:2]} == {f"layers.{CULPRIT}.linear1", f"layers.{CULPRIT}.linear2"}
    assert [row.path for row in report.operations if row.overflows] == [f"layers.{CULPRIT}.linear1"]


def test_the_float32_operations_hold_the_bound_and_none_can_be_spared(report: DoctorReport) -> None:
    assert set(report.fp32_ops) == {f"layers.{CULPRIT}.linear1", f"layers.{CULPRIT}.linear2"}
    assert report.max_abs_with_fp32_ops <= report.bound
    assert report.option == "--precision fp16 --fp32-ops " + ",".join(report.fp32_ops)


def test_the_report_as_table_and_page(report: DoctorReport) -> None:
    page = doctor_page([report])
    assert page.count("<tr>") == len(report.operations) + 1 and "not finite" in page
    assert "<script" not in page and "src=" not in page and 'href="http' not in page
    assert doctor_view([report]) and DoctorReport.model_validate_json(report.model_dump_json()) == report


def test_a_sound_encoder_needs_no_float32_operations_and_a_tight_bound_is_refused() -> None:
    probe = probe_of(encoder_of(1), torch.bfloat16)
    found = examine(probe, precision="bf16", bound=BOUNDS["bf16"], origin="sound")
    assert found.fp32_ops == () and 0 < found.max_abs == found.max_abs_with_fp32_ops <= BOUNDS["bf16"]
    probe._known[frozenset()] = {"max_abs": 1e-6, "cosine": 1.0}
    with pytest.raises(VerificationError, match="float32 itself"):
        examine(probe, precision="bf16", bound=1e-7, origin="sound")


def test_float32_operations_are_as_few_as_can_be() -> None:
    ranked = list("abcdefgh")
    assert fewest_fp32_ops(ranked, lambda kept: True) == []
    assert fewest_fp32_ops(ranked, lambda kept: {"b", "g"} <= set(kept)) == ["b", "g"]
    assert fewest_fp32_ops(ranked, lambda kept: len(kept) >= len(ranked)) == ranked


def test_the_command(default_artifact: Path, small_encoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factory_of_doctor.py").write_text("from conftest import SMALL\nENCODER = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import factory_of_doctor  # type: ignore[import-not-found]

    factory_of_doctor.ENCODER = small_encoder
    page = tmp_path / "page.html"
    options = ["--module", "factory_of_doctor:ENCODER", "--tokens", "16", "--html", str(page), "--json"]
    done = CliRunner().invoke(app, ["doctor", str(default_artifact), *options])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["precision"] == "fp16" and page.read_text().startswith("<!doctype html>")
    refused = CliRunner().invoke(app, ["doctor", str(default_artifact), "--html", str(tmp_path / "no" / "page.html")])
    assert refused.exit_code == 2 and "cannot be written" in refused.stderr


def peaked(keys: int) -> tuple[torch.Tensor, ...]:
    """Scores that say little, over many keys: the weights are small, and their steps in half precision large."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn((1, 2, rows, 16), generator=generator) for rows in (64, keys, keys))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_softmax_in_float32_is_nearer_than_one_whose_steps_round(dtype: torch.dtype) -> None:
    query, key, value = peaked(1024)
    exact = nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    off = {
        form: float((emulated_attention(form, dtype, query, key, value, None, None) - exact).square().mean().sqrt())
        for form in ("layer", "explicit")
    }
    assert 0 < off["explicit"] < off["layer"]


def test_the_emulated_attention_masks_as_torchs_does() -> None:
    query, key, value = peaked(40)
    keep = torch.rand((1, 1, 64, 40), generator=torch.Generator().manual_seed(1)) > 0.3
    keep[..., 0, :] = False  # this row sees nothing
    added = torch.where(keep, 0.0, -math.inf)
    for mask in (keep, added, keep[..., 1:2, :], None):
        wanted = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
        for form in ("layer", "explicit"):
            got = emulated_attention(form, torch.float32, query, key, value, mask, 0.3)
            torch.testing.assert_close(got, wanted.nan_to_num(0.0))


def test_the_form_is_part_of_what_is_proposed(default_artifact: Path) -> None:
    probe = Probe(probe_of(encoder_of(1), torch.float16).program, (), torch.float16, "explicit")
    found = examine(probe, precision="fp16", bound=1.0, origin="sound")
    assert found.attention == "explicit" and found.option == "--precision fp16 --attention explicit"
    refused = CliRunner().invoke(app, ["doctor", str(default_artifact), "--precision", "int8", "--attention", "explicit"])
    assert refused.exit_code == 2 and "int8 is of linears" in refused.stderr
