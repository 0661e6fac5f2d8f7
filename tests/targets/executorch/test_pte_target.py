"""The .pte in ExecuTorch's own runtime against Meta's layers: branches, sizes, padding, what it weighs, what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sam3x
from sam3x.capture.capture import capture
from sam3x.capture.program import CapturedProgram
from sam3x.capture.samples import Sizes, make_inputs
from sam3x.errors import ArtifactError, LoweringError, SpecError, TargetUnavailableError
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.passes.pipeline import PassPipeline
from sam3x.spec import make_spec
from sam3x.targets.executorch.target import PteOptions, PteTarget
from support.folders import MadeOnce
from support.upstream import check_branches, encoder_of


def export(encoder: nn.Module, folder: Path, **options: Any) -> sam3x.Artifact:
    return sam3x.export(encoder, target="pte", output=folder / "out", **{"tokens": 36, "batch": (1, 2), **options})


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return encoder_of(2)


@pytest.fixture(scope="module")
def artifact(encoder: nn.Module, made_once: MadeOnce) -> sam3x.Artifact:
    options: dict[str, Any] = {"tokens": 36, "batch": (1, 2), "verify": "each"}
    return sam3x.load(made_once("pte", lambda folder: sam3x.export(encoder, target="pte", output=folder, **options)))


# ---- numbers


@pytest.mark.parametrize("padding", ["none", "some", "all"])
@pytest.mark.parametrize("prompt", [1, 7, 77])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_branch_size_and_padding(
    artifact: sam3x.Artifact, encoder: nn.Module, batch: int, prompt: int, padding: str
) -> None:
    check_branches(artifact, encoder, Sizes(batch=batch, tokens=36, prompt_length=prompt, padding=padding))


def test_peaked_attention_stays_as_near_to_float64_as_eager(tmp_path: Path) -> None:
    encoder = encoder_of(1, peaked=4.0)
    artifact = export(encoder, tmp_path, dac=False, pre_norm=True)
    check_branches(artifact, encoder, Sizes(batch=2, tokens=36, prompt_length=32), [(False, True)])


@pytest.mark.long
def test_dynamic_tokens_and_larger_batches(tmp_path: Path) -> None:
    encoder = encoder_of(1)
    artifact = export(encoder, tmp_path, tokens=(16, 64), batch=(1, 4))
    for tokens, batch in ((16, 1), (64, 4), (37, 2)):
        check_branches(artifact, encoder, Sizes(batch=batch, tokens=tokens, prompt_length=5))


@pytest.mark.parametrize("config", [{"pos_enc_at_cross_attn_queries": True}, {"activation": "gelu"}, {"num_heads": 1}], ids=str)
def test_other_hyper_parameters(config: dict[str, Any], tmp_path: Path) -> None:
    encoder = encoder_of(1, **config)
    artifact = export(encoder, tmp_path, dac=False, pre_norm=True)
    check_branches(artifact, encoder, Sizes(batch=2, tokens=36, prompt_length=5), [(False, True)])


def test_masks_of_the_image_tokens(tmp_path: Path) -> None:
    encoder = encoder_of(1)
    names = ("tgt", "memory", "tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "pos", "query_pos")
    artifact = export(encoder, tmp_path, inputs=names)
    check_branches(artifact, encoder, Sizes(batch=2, tokens=36, prompt_length=5))


@pytest.mark.long
def test_a_mask_of_all_pairs_where_dac_halves_the_tokens(tmp_path: Path) -> None:
    encoder = encoder_of(1)
    names = ("tgt", "memory", "tgt_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "query_pos")
    artifact = export(encoder, tmp_path, inputs=names, dac_dim=1)
    for batch, padding in ((1, "some"), (2, "all")):
        check_branches(artifact, encoder, Sizes(batch=batch, tokens=36, prompt_length=5, padding=padding))


def test_fixed_flags_are_no_inputs_and_agree(tmp_path: Path) -> None:
    encoder = encoder_of(1)
    artifact = export(encoder, tmp_path, dac=False, pre_norm=True)
    assert artifact.manifest.input_names == ("tgt", "memory", "memory_key_padding_mask", "query_pos")
    check_branches(artifact, encoder, Sizes(batch=1, tokens=36, prompt_length=7), [(False, True)])


@pytest.mark.long
def test_feature_maps(tmp_path: Path) -> None:
    options: dict[str, Any] = {"interface": "feature_maps", "feature_sizes": ((6, 6),), "dac": False, "pre_norm": "module"}
    artifact = sam3x.export(encoder_of(1), target="pte", output=tmp_path / "out", tokens=(16, 9216), **options)
    assert artifact.manifest.verified


# ---- the trap: outputs of several torch.conds share memory


class Chain(nn.Module):
    """Three conditionals in a row whose results are alive together."""

    def forward(self, x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
        first = torch.cond(flag, lambda y: (y.sin(),), lambda y: (y.cos(),), (x,))[0]
        second = torch.cond(flag, lambda y: (y * 2,), lambda y: (y * 3,), (x,))[0]
        third = torch.cond(flag, lambda y: (y - 1,), lambda y: (y + 1,), (x,))[0]
        return first + second * third


def test_several_conditionals_are_refused_never_lowered_wrong(tmp_path: Path) -> None:
    encoder = encoder_of(2)
    with pytest.raises(LoweringError, match=r"conditionals are left.*executorch/issues/21490.*--branches select"):
        export(encoder, tmp_path, branches="cond")
    assert not (tmp_path / "out").exists()


def test_several_conditionals_are_still_wrong_in_this_executorch(tmp_path: Path) -> None:
    """The day this fails, ``conditionals_are_sound`` can name the release that mended it."""
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    program = torch.export.export(Chain(), (x, torch.tensor(True)))
    path = tmp_path / "chain.pte"
    path.write_bytes(to_edge_transform_and_lower(program).to_executorch().buffer)
    method = Runtime.get().load_program(str(path)).load_method("forward")
    off = [float((method.execute([x, flag])[0] - Chain()(x, flag)).abs().max()) for flag in map(torch.tensor, (True, False))]
    assert max(off) > 1e-2


# ---- what the file holds


def test_every_weight_stands_once_in_the_file(tmp_path: Path) -> None:
    encoder = encoder_of(1, d_model=256, num_heads=8, dim_feedforward=2048)
    artifact = export(encoder, tmp_path, verify="off")
    parameters = sum(p.numel() * p.element_size() for p in encoder.layers.parameters())
    assert artifact.path.stat().st_size <= 1.02 * parameters


def test_everything_heavy_is_one_delegate(canonical: CapturedProgram, tmp_path: Path) -> None:
    metadata = lowered(canonical, tmp_path, PteOptions())
    assert metadata["delegates"] == 1 and metadata["delegated_flops"] > 0.99
    assert not {
        "native_layer_norm",
        "expand_copy",
        "slice_copy",
        "split_with_sizes_copy",
        "permute_copy",
        "bmm",
        "_softmax",
    } & set(metadata["portable"])
    assert metadata["delegated"]["_softmax"] == 2 * 2 * 4 and metadata["delegated"]["rsqrt"] == 2 * 6
    # what is left: a few operators on masks and flags, once for all layers, and room for the output
    assert sum(metadata["portable"].values()) < 30 and metadata["planned_bytes"] < 2 * 36 * 32 * 4 + 10_000


@pytest.mark.long
def test_portable_kernels_alone(tmp_path: Path) -> None:
    artifact = export(encoder_of(1), tmp_path, delegate="none")
    metadata = artifact.manifest.metadata
    assert metadata["delegates"] == 0 and metadata["delegated"] == {} and metadata["delegated_flops"] == 0.0
    check_branches(artifact, encoder_of(1), Sizes(batch=2, tokens=36, prompt_length=7))


@pytest.fixture(scope="module")
def canonical() -> CapturedProgram:
    return default_pipeline("select").run(capture(encoder_of(2), make_spec(tokens=36, batch=(1, 2))))[0]


def lowered(canonical: CapturedProgram, folder: Path, options: PteOptions) -> dict[str, Any]:
    target = PteTarget()
    captured, _ = PassPipeline(target.legalization_passes(options)).run(canonical)
    before = str(captured.program.graph), dict(captured.program.range_constraints)
    metadata = target.lower(captured, folder / "x.pte", options)
    assert before == (str(captured.program.graph), dict(captured.program.range_constraints))
    return metadata


def test_the_file_names_its_inputs_and_outputs(artifact: sam3x.Artifact) -> None:
    from executorch.runtime import Runtime

    (text,) = Runtime.get().load_program(str(artifact.path)).load_method("sam3x_contract").execute([])
    assert json.loads(text) == {"inputs": list(artifact.manifest.input_names), "outputs": ["output"]}
    arrays = {"dac": np.array(False), "pre_norm": np.array(True)}
    arrays |= {"tgt": np.zeros((1, 36, 32), np.float32), "query_pos": np.zeros((1, 36, 32), np.float32)}
    arrays |= {"memory": np.zeros((1, 5, 32), np.float32), "memory_key_padding_mask": np.zeros((1, 5), bool)}
    assert artifact.run(arrays)["output"].shape == (1, 36, 32)  # any order


def test_defaults_are_a_phones(encoder: nn.Module) -> None:
    assert dict(PteTarget.default_options) == {"batch": (1, 2), "tokens": 5184, "prompt_length": (1, 77)}


# ---- errors


def test_a_size_outside_the_bounds_is_refused(artifact: sam3x.Artifact) -> None:
    inputs = make_inputs(
        ("tgt", "memory", "memory_key_padding_mask", "query_pos"),
        make_spec(),
        32,
        Sizes(batch=3, tokens=36, prompt_length=5),
        0,
    )
    with pytest.raises(ArtifactError, match="'batch' is 1 to 2"):
        artifact.run({**inputs, "dac": False, "pre_norm": True})


def test_an_unknown_delegate_is_refused(encoder: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="delegate"):
        export(encoder, tmp_path, delegate="gpu")


def test_without_executorch_the_target_says_how_to_get_it(
    artifact: sam3x.Artifact, encoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "executorch" else found(name, *rest))
    assert not PteTarget().availability().available and "missing executorch" in PteTarget().availability().detail
    with pytest.raises(TargetUnavailableError, match=r'pip install "sam3x\[pte\]"'):
        export(encoder, tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "executorch.runtime", None)
    with pytest.raises(TargetUnavailableError, match=r'pip install "sam3x\[pte\]"'):
        PteTarget().load_runner(artifact.path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pte"
    path.write_bytes(b"no program at all, but long enough to read a header from" * 10)
    with pytest.raises(ArtifactError, match=r"ExecuTorch cannot load .*x\.pte"):
        PteTarget().load_runner(path)
