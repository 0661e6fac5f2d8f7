"""Engines from the real TensorRT-RTX builder: one engine, everything converted, numbers of the graph, what is refused."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam3x
from sam3x.capture.capture import capture
from sam3x.errors import LoweringError, Step, TargetUnavailableError, VerificationError
from sam3x.pipeline.request import resolve
from sam3x.sources.encoder import default_source
from sam3x.spec import make_spec
from sam3x.targets.tensorrt.driver import import_torch_tensorrt, named_device
from sam3x.targets.tensorrt.target import TrtTarget
from support.attention_styles import STYLES, Attention
from support.trt import GPU, NO_GPU, SIZES, SMALL, captured, legal, lower, with_unknown, zeros_of
from support.upstream import encoder_of


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return encoder_of(2)


@pytest.fixture(scope="module")
def folder(encoder: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trt") / "out"
    sam3x.export(encoder, target="trt", output=output, **SMALL)
    return output


# ---- one engine, and what it says of itself


def test_an_engine_built_without_a_gpu_says_what_it_is(folder: Path) -> None:
    manifest = sam3x.load(folder).manifest
    found = manifest.metadata
    assert set(manifest.files) == {"fusion_encoder.engine"} and (folder / "fusion_encoder.engine").stat().st_size > 100_000
    assert found["compute_capability"] == "sm89" and found["distribution"].startswith("torch-tensorrt")
    assert (found["engines"], found["left_to_torch"], found["attention_layers"]) == (1, 0, 4)
    assert found["profile"]["tgt"] == "1x36x32 / 1x36x32 / 4x36x32"
    assert found["profile"]["memory"] == "1x1x32 / 1x9x32 / 4x9x32"
    assert (
        found["dtypes"]["memory_key_padding_mask"] == found["dtypes"]["dac"] == "bool" and found["dtypes"]["output"] == "float"
    )
    assert found["engine_bytes"] > found["weights_bytes"] > 0 and found["activation_bytes"] > 0 and found["build_seconds"] < 60


def test_its_graph_is_proven_in_every_branch_and_all_padded(folder: Path) -> None:
    drift = sam3x.load(folder).manifest.metadata["drift"]
    branches = {f"dac={dac} pre_norm={pre}" for dac, pre in itertools.product((False, True), repeat=2)}
    assert {case.partition(",")[0] for case in drift} == branches and any("all padded" in case for case in drift)


@NO_GPU
def test_without_a_gpu_it_is_not_called_verified(folder: Path) -> None:
    manifest = sam3x.load(folder).manifest
    assert not manifest.verified and "sam3x verify" in str(manifest.verified_reason)
    with pytest.raises(TargetUnavailableError, match="runs on a GPU"):
        sam3x.load(folder).run({name: zeros_of(manifest, name) for name in manifest.input_names})


@pytest.mark.parametrize(("form", "precision"), [("select", "fp16"), ("select", "bf16"), ("cond", "fp16"), ("cond", "bf16")])
def test_lower_precisions_in_one_engine(form: str, precision: str, tmp_path: Path) -> None:
    found = lower(captured(form), tmp_path / "x.engine", branches=form, precision=precision)
    assert found["attentions"] == 4 and found["tiled_attention_loops"] == 0
    assert found["attention_layers"] == (0 if (form, precision) == ("cond", "bf16") else 4)
    assert found["dtypes"]["tgt"] == found["dtypes"]["output"] == "float"  # what callers hand over does not change
    drift = [dict(item.split(" ") for item in text.split(", ")) for text in found["drift"].values()]
    bound = {"fp16": (2e-2, 0.99999), "bf16": (1.5e-1, 0.9995)}[precision]  # 11 and 8 bits on values up to 4
    assert all(float(item["max_abs"]) <= bound[0] and float(item["cosine"]) >= bound[1] for item in drift)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_graph_that_is_known_to_be_wrong_is_refused_in_every_precision(precision: str) -> None:
    program, own = legal(captured("select"), compute_capability="sm89", precision=precision)
    right = program.eager
    TrtTarget().prove(program, own)
    wrong = dataclasses.replace(program, eager=lambda x: {"output": right(x)["output"] * 1.1}, exact=None)
    with pytest.raises(VerificationError, match="from eager, allowed") as failed:
        TrtTarget().prove(wrong, own)
    assert failed.value.step is Step.LOWER


def test_conditionals_stay_conditionals_in_one_engine(tmp_path: Path) -> None:
    found = lower(captured("cond"), tmp_path / "x.engine", branches="cond")
    assert found["conditionals"] == 12 and found["left_to_torch"] == 0  # six norms a layer; dac is a mask of rows
    assert found["layers"]["conditional_output"] == 24  # mean and variance of each


@pytest.mark.parametrize("form", ["select", "cond"])
def test_dac_at_a_fixed_batch_of_one_leaves_no_conditional_of_sizes(form: str, tmp_path: Path) -> None:
    spec = sam3x.spec.make_spec(branches=form, tokens=36, batch=1, prompt_length=(1, 9))
    found = lower(capture(encoder_of(1), spec), tmp_path / "x.engine", branches=form)
    assert found["conditionals"] == (0 if form == "select" else 6)


def test_a_profile_is_tuned_for_the_sizes_that_are_named(tmp_path: Path) -> None:
    found = lower(captured("select"), tmp_path / "x.engine", opt_batch=2, opt_prompt_length=5)
    assert found["profile"]["memory"] == "1x1x32 / 2x5x32 / 4x9x32"


def test_scores_in_float32_keep_the_budget(encoder: nn.Module, tmp_path: Path) -> None:
    fixed = {"dac": False, "pre_norm": True, "batch": 1, "prompt_length": 9}
    program = capture(encoder, sam3x.spec.make_spec(branches="select", tokens=2400, verify="off", **fixed))
    plain = lower(program, tmp_path / "plain.engine", attention_memory="256MB")
    tiled = lower(program, tmp_path / "tiled.engine", attention_memory="4MiB")
    assert plain["attentions"] == tiled["attentions"] == 4
    assert plain["tiled_attention_loops"] == 0 and tiled["tiled_attention_loops"] == 2
    scores = 4 * 2400 * 2400 * 4  # heads, queries, keys, bytes
    assert plain["activation_bytes"] > 2 * scores and tiled["activation_bytes"] < scores / 4


def test_a_dynamic_batch_is_built_in_loops_over_images(tmp_path: Path) -> None:
    found = lower(captured("select"), tmp_path / "x.engine", attention_memory="20KB")
    assert found["form"].startswith("attention in loops") and "notes" not in found and found["tiled_attention_loops"] == 2


def test_keys_of_the_prompt_wait_for_the_attention_before_them() -> None:
    """What the grid's activations for sm75 show in full: 498 MB without, 295 MB with it."""
    with named_device((8, 9)):
        import_torch_tensorrt()
        from sam3x.targets.tensorrt.interpreter import independent_products
    program, _ = legal(captured("select"), compute_capability="sm75", attention_memory="20KB")
    found = independent_products(program.program.module(check_guards=False))
    places = [str(node.args[1]).removeprefix("encoder_").rsplit("_in_proj")[0] for node in found]
    assert sorted(places) == ["layers_0_cross_attn_image", *["layers_0_self_attn"] * 3, "layers_1_cross_attn_image"]


def test_masks_of_image_tokens_and_dynamic_tokens_in_tiles(tmp_path: Path) -> None:
    names = ("tgt", "memory", "tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "pos", "query_pos")
    spec = sam3x.spec.make_spec(branches="select", inputs=names, dac=False, tokens=(16, 90), batch=(1, 2), prompt_length=(1, 9))
    found = lower(capture(encoder_of(1), spec), tmp_path / "x.engine", attention_memory="64KiB")
    assert found["tiled_attention_loops"] >= 1 and found["left_to_torch"] == 0


@pytest.mark.parametrize("form", ["select", "cond"])
def test_a_mask_of_all_pairs_where_dac_halves_the_tokens(form: str, tmp_path: Path) -> None:
    names = ("tgt", "memory", "tgt_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "query_pos")
    options = {**SMALL, "inputs": names, "dac_dim": 1, "branches": form, "attention_memory": "2KB"}
    found = sam3x.export(encoder_of(1), target="trt", output=tmp_path / "out", **options).manifest.metadata
    assert found["conditionals"] == (0 if form == "select" else 6) and found["left_to_torch"] == 0
    assert any(case.startswith("dac=True") for case in found["drift"])


class OneHead(Attention):
    """Attention of three dimensions, its mask of two."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, hide: Any) -> Tensor:
        keep = None if hide is None else ~hide
        return nn.functional.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], keep)[:, None]


@pytest.mark.parametrize(
    ("style", "masks", "layers", "softmax"),
    [
        (STYLES["matmul"], ("tgt_mask", "memory_mask"), 2, 0),
        (OneHead, ("tgt_mask", "memory_mask"), 0, 2),
        (STYLES["sdpa"], ("memory_mask", "memory_key_padding_mask"), 2, 0),
    ],
    ids=["two dimensions", "three-dimensional attention", "bitwise"],
)
def test_masks_as_others_write_them(style: Any, masks: tuple[str, ...], layers: int, softmax: int, tmp_path: Path) -> None:
    """TensorRT's attention layer takes four dimensions; attention that has others becomes products and a softmax."""
    encoder = encoder_of(1)
    encoder.layers[0].self_attn, encoder.layers[0].cross_attn_image = (style(32, 1) for _ in range(2))
    names = ("tgt", "memory", *masks)
    spec = sam3x.spec.make_spec(branches="select", inputs=names, dac=False, tokens=36, batch=(1, 2), prompt_length=(1, 9))
    found = lower(capture(encoder, spec), tmp_path / "x.engine")
    assert (found["attention_layers"], found["layers"].get("softmax", 0), found["left_to_torch"]) == (
        layers,
        softmax,
        0,
    )


def test_feature_maps(tmp_path: Path) -> None:
    maps = {"interface": "feature_maps", "feature_sizes": ((6, 6),), "batch": 1, "prompt_length": 9}
    artifact = sam3x.export(encoder_of(1), target="trt", output=tmp_path / "out", compute_capability="sm80", **maps)
    assert artifact.manifest.metadata["left_to_torch"] == 0


# ---- float32 operations


class Running(nn.Linear):
    """A linear over what its input has summed up to, for which Torch-TensorRT gives float32 whatever it is given."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + input.cumsum(-1) / 64)


def test_what_a_converter_gives_has_the_precision_of_the_graph(tmp_path: Path) -> None:
    encoder: Any = encoder_of(1)
    given = encoder.layers[0].linear2
    encoder.layers[0].linear2 = Running(given.in_features, given.out_features)
    program = capture(encoder, make_spec(dac=False, pre_norm="module", **SIZES))
    assert any("cumsum" in str(node.target) for node in program.program.graph.nodes)
    assert lower(program, tmp_path / "e.engine", precision="fp16")["engines"] == 1


def test_named_operations_stay_in_float32() -> None:
    program, _ = legal(captured("select"), precision="fp16", compute_capability="sm89", fp32_ops="layers.1, softmax")
    weights = {
        name: value.dtype
        for name, value in program.program.state_dict.items()
        if "linear1_weight" in name or "linear1.weight" in name
    }
    assert set(weights.values()) == {torch.float16, torch.float32}
    attention = [node for node in program.program.graph.nodes if "tiled_attention" in str(node.target)]
    assert [node.meta["val"].dtype for node in attention] == [torch.float32] * 4


def test_an_overflow_is_refused_with_the_way_to_find_it(encoder: nn.Module, tmp_path: Path) -> None:
    loud = encoder_of(1)
    with torch.no_grad():
        loud.layers[0].linear1.weight.mul_(4e4)
        loud.layers[0].linear2.weight.div_(4e4)
    with pytest.raises(VerificationError, match=r"fp16 overflows.*sam3x doctor"):
        sam3x.export(loud, target="trt", output=tmp_path / "out", precision="fp16", **SMALL)
    assert not (tmp_path / "out").exists()
    artifact = sam3x.export(
        loud, target="trt", output=tmp_path / "out", precision="fp16", fp32_ops="layers.0.linear1,layers.0.linear2", **SMALL
    )
    assert artifact.manifest.metadata["engines"] == 1


def test_dynamic_tokens_dac_and_all_masks_beside_conditionals(tmp_path: Path) -> None:
    """TensorRT refused the sizes of it below the top level until they were stated."""
    names = ("tgt", "memory", "tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "pos", "query_pos")
    spec = sam3x.spec.make_spec(branches="cond", inputs=names, tokens=(16, 90), batch=(1, 2), prompt_length=(1, 9))
    assert lower(capture(encoder_of(1), spec), tmp_path / "x.engine", branches="cond")["conditionals"] > 0


# ---- refusals


def test_an_operation_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.engine"
    said = r"1 operations have no form.*relu \(aten.special_bessel_j0.default: no converter\)"
    with pytest.raises(LoweringError, match=said):
        TrtTarget().lower(with_unknown(captured("select")), path, resolve("trt", SMALL).options)
    assert not path.exists()


def test_a_float32_operation_that_names_nothing_is_refused() -> None:
    with pytest.raises(sam3x.errors.PassError, match=r"'layers.7' names no operation.*layers.0"):
        legal(captured("select"), precision="fp16", compute_capability="sm89", fp32_ops="layers.7")


# ---- on a machine with a GPU


@GPU
@pytest.mark.parametrize(("form", "precision"), itertools.product(("select", "cond"), ("fp32", "tf32", "fp16", "bf16")))
def test_the_engine_runs_and_is_verified(encoder: nn.Module, form: str, precision: str, tmp_path: Path) -> None:
    artifact = sam3x.export(encoder, target="trt", output=tmp_path / "out", branches=form, precision=precision, **SIZES)
    assert artifact.manifest.verified and artifact.manifest.verification
    inputs = {name: zeros_of(artifact.manifest, name) for name in artifact.manifest.input_names}
    assert artifact.run(inputs)["output"].shape == (2, 36, 32)


@GPU
def test_a_folder_from_another_machine_is_completed(
    encoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrtTarget, "unverifiable", lambda self, options: "pretend")
    sam3x.export(encoder, target="trt", output=tmp_path / "out", **SIZES)
    monkeypatch.undo()
    assert not sam3x.load(tmp_path / "out").manifest.verified
    sam3x.api.verify(tmp_path / "out", encoder)
    assert sam3x.load(tmp_path / "out").manifest.verified


def test_an_input_that_is_an_output_too_keeps_its_name(encoder: nn.Module, tmp_path: Path) -> None:
    """``memory_text`` is ``prompt``: called by the output's name, a prompt of dynamic length had no profile."""
    spec = {
        "interface": "feature_maps",
        "feature_sizes": ((4, 6),),
        "batch": (2, 4),
        "prompt_length": (6, 12),
        "pre_norm": True,
    }
    artifact = sam3x.export(encoder, target="trt", output=tmp_path / "out", dac=False, compute_capability="sm89", **spec)
    assert "memory_text" in artifact.manifest.output_names and "prompt" in artifact.manifest.metadata["profile"]


# ---- ONNX for trtexec


def test_onnx_for_trtexec_is_verified_and_builds(encoder: nn.Module, tmp_path: Path) -> None:
    artifact = sam3x.export(encoder, target="trt", output=tmp_path / "out", format="plan-onnx", branches="cond", **SMALL)
    found = artifact.manifest.metadata
    assert artifact.manifest.verified and artifact.path.name == "fusion_encoder.onnx"
    assert found["engine_bytes"] > 0 and found["conditionals"] > 0 and "--noTF32 --minShapes=tgt:1x36x32" in found["trtexec"]


# ---- the default encoder


@pytest.mark.long
def test_the_default_encoder_in_half_precision_for_one_image(tmp_path: Path) -> None:
    spec = sam3x.spec.make_spec(branches="select", tokens=5184, batch=1, prompt_length=(1, 77), verify="off")
    found = lower(capture(default_source(0).module, spec), tmp_path / "x.engine", precision="fp16")
    assert (found["attentions"], found["attention_layers"], found["left_to_torch"]) == (12, 12, 0)
    assert found["activation_bytes"] <= 60e6
