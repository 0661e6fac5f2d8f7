"""The default artifact against Meta's own layers, at sizes and in branches that were not traced."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import sam3x
from sam3x.capture.samples import Sizes, make_inputs
from sam3x.spec import make_spec
from support.folders import MadeOnce
from support.upstream import BRANCHES, assert_equal_to_upstream, check_branches, encoder_of


@pytest.fixture(scope="module")
def sam3_encoder() -> nn.Module:
    return encoder_of(6, d_model=256, num_heads=8, dim_feedforward=2048)


@pytest.fixture(scope="module")
def artifact(sam3_encoder: nn.Module, made_once: MadeOnce) -> sam3x.Artifact:
    return sam3x.load(made_once("parity", lambda folder: sam3x.export(sam3_encoder, target="onnx", output=folder)))


def inputs_of(artifact: sam3x.Artifact, width: int, sizes: Sizes, seed: int = 7) -> dict[str, Any]:
    spec = make_spec(**artifact.manifest.spec)
    names = tuple(name for name in artifact.manifest.input_names if name not in ("dac", "pre_norm"))
    return make_inputs(names, spec, width, sizes, seed)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(batch=batch, tokens=tokens, prompt_length=prompt, padding=padding)
        for batch, tokens, prompt, padding in (
            (1, 37, 1, "none"),
            (2, 37, 7, "some"),
            (4, 300, 77, "some"),
            (6, 37, 7, "some"),
            (2, 300, 1, "none"),
            (1, 300, 77, "some"),
            (2, 37, 32, "all"),
            (6, 37, 1, "all"),
        )
    ],
    ids=str,
)
def test_every_branch_at_other_sizes(artifact: sam3x.Artifact, sam3_encoder: nn.Module, sizes: Sizes) -> None:
    check_branches(artifact, sam3_encoder, sizes)


@pytest.mark.long
@pytest.mark.parametrize("branch", BRANCHES, ids=lambda b: f"dac={b[0]} pre_norm={b[1]}")
def test_72x72_tokens(artifact: sam3x.Artifact, sam3_encoder: nn.Module, branch: tuple[bool, bool]) -> None:
    check_branches(artifact, sam3_encoder, Sizes(batch=2, tokens=5184, prompt_length=32), [branch])


def test_file_is_opset_18_standard_domain_with_if_from_the_inputs(artifact: sam3x.Artifact) -> None:
    model = onnx.load(artifact.path)
    assert {item.domain: item.version for item in model.opset_import} == {"": 18}
    onnx.checker.check_model(str(artifact.path), full_check=True)
    made_by = {name: node for node in model.graph.node for name in node.output}
    conditions = [node.input[0] for node in model.graph.node if node.op_type == "If"]
    assert conditions

    def roots(name: str) -> set[str]:
        return {root for i in made_by[name].input for root in roots(i)} if name in made_by else {name}

    assert {root for name in conditions for root in roots(name)} == {"dac", "pre_norm"}


def test_every_weight_stands_once_in_the_file(artifact: sam3x.Artifact, sam3_encoder: nn.Module) -> None:
    parameters = sum(p.numel() * p.element_size() for p in sam3_encoder.layers.parameters())
    assert artifact.path.stat().st_size <= 1.02 * parameters


def test_names_are_readable(artifact: sam3x.Artifact) -> None:
    model = onnx.load(artifact.path)
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert shapes["tgt"] == ["batch", "tokens", 256]
    assert shapes["memory_key_padding_mask"] == ["batch", "prompt_length"]
    assert [v.name for v in model.graph.output] == ["output"]
    assert tuple(shapes) == artifact.manifest.input_names
    names = Counter(node.name for node in model.graph.node)
    assert max(names.values()) == 1


def test_peaked_attention_stays_as_near_to_float64_as_eager(tmp_path: Path) -> None:
    encoder = encoder_of(3, peaked=4.0)
    artifact = sam3x.export(encoder, output=tmp_path / "out")
    check_branches(artifact, encoder, Sizes(batch=2, tokens=300, prompt_length=32))


def test_weights_that_differ_in_every_layer_are_kept_apart(tmp_path: Path) -> None:
    encoder = encoder_of(3)
    artifact = sam3x.export(encoder, output=tmp_path / "out")
    inputs = inputs_of(artifact, 32, Sizes(batch=2, tokens=20, prompt_length=4))
    encoder.layers[1], encoder.layers[2] = encoder.layers[2], encoder.layers[1]
    swapped = artifact.run({**inputs, "dac": False, "pre_norm": True})["output"]
    with pytest.raises(AssertionError):
        assert_equal_to_upstream(swapped, encoder.layers, inputs, dac=False, pre_norm=True)


def test_a_fixed_batch_of_two_has_a_half_of_one(tmp_path: Path) -> None:
    """dac's half of a fixed 2 is 1: taken for 2, the export was silently wrong with dac on."""
    encoder = encoder_of(1)
    artifact = sam3x.export(encoder, output=tmp_path / "out", batch=2, tokens=36, prompt_length=4, verify="each")
    check_branches(artifact, encoder, Sizes(batch=2, tokens=36, prompt_length=4))


@pytest.mark.parametrize("sizes", [{"batch": 2, "tokens": 36}, {"dac_dim": 1, "tokens": 2}], ids=["images", "tokens"])
def test_pre_norm_alone_decides_about_a_half_of_one(sizes: dict, tmp_path: Path) -> None:
    """Post-norm ignores dac, so a dac that is always on halves by the flag of the norm; found by ``make fuzz``."""
    artifact = sam3x.export(encoder_of(1), output=tmp_path / "out", dac=True, prompt_length=4, **sizes)
    records = artifact.manifest.verification
    assert {record.branch for record in records} == {"pre_norm=False", "pre_norm=True"} and all(r.passed for r in records)


def test_the_module_and_the_callers_objects_are_left_as_they_were(tmp_path: Path) -> None:
    encoder = encoder_of(2).train()
    encoder.layers[0].self_attn.eval()
    fired: list[str] = []
    encoder.layers[0].register_forward_hook(lambda *_: fired.append("layer"))
    encoder.layers[1].linear1.weight.requires_grad_(False)
    state = {name: (value.data_ptr(), value.clone()) for name, value in encoder.state_dict().items()}
    metadata = [(name, module.training, sorted(module.__dict__)) for name, module in encoder.named_modules()]
    gradients = [p.requires_grad for p in encoder.parameters()]
    layers = list(encoder.layers)
    generator, fastpath = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    sam3x.export(layers, output=tmp_path / "out")
    assert layers == list(encoder.layers)
    assert [(name, module.training, sorted(module.__dict__)) for name, module in encoder.named_modules()] == metadata
    assert [p.requires_grad for p in encoder.parameters()] == gradients
    for name, value in encoder.state_dict().items():
        assert value.data_ptr() == state[name][0] and torch.equal(value, state[name][1])
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.backends.mha.get_fastpath_enabled() is fastpath
