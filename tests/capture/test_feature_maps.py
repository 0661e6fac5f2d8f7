"""The ``feature_maps`` interface against ``TransformerEncoderFusion.forward`` itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sam3x
from sam3x.capture.samples import Sizes, make_inputs
from sam3x.errors import SpecError
from sam3x.spec import make_spec
from support.upstream import encoder_of


def upstream(encoder: nn.Module, inputs: dict[str, Tensor], sizes: Any) -> dict[str, Tensor]:
    """Upstream's dict, its seq-first lists made from maps of (B, C, H, W); it writes into what it is given."""
    levels = range(len(sizes))

    def lists(name: str) -> list[Tensor]:
        return [inputs[f"{name}_{i}"].clone().flatten(2).permute(2, 0, 1) for i in levels]

    masks = None
    if "src_key_padding_mask_0" in inputs:
        masks = [inputs[f"src_key_padding_mask_{i}"].flatten(1).transpose(0, 1) for i in levels]
    with torch.no_grad():
        result = encoder(
            src=lists("src"),
            prompt=inputs["prompt"].clone(),
            src_key_padding_mask=masks,
            src_pos=lists("src_pos"),
            prompt_key_padding_mask=inputs.get("prompt_key_padding_mask"),
            feat_sizes=list(sizes),
        )
    return {name: value for name, value in result.items() if value is not None}


CASES = {
    "one level": ({}, ((6, 5),), ""),
    "one level, padded maps": ({}, ((6, 5),), "src,src_key_padding_mask,src_pos,prompt,prompt_key_padding_mask"),
    "two levels": ({"num_feature_levels": 2}, ((6, 4), (3, 2)), ""),
    "three levels, padded maps": (
        {"num_feature_levels": 3},
        ((6, 4), (4, 4), (2, 2)),
        "src,src_key_padding_mask,src_pos,prompt,prompt_key_padding_mask",
    ),
    "pooled text": ({"add_pooled_text_to_img_feat": True}, ((6, 5),), ""),
    "pooled text, no mask": (
        {"add_pooled_text_to_img_feat": True, "pool_text_with_mask": False},
        ((4, 4),),
        "src,src_pos,prompt",
    ),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_upstream(case: str, tmp_path: Path) -> None:
    config, sizes, inputs = CASES[case]
    encoder = encoder_of(2, **config)
    options: dict[str, Any] = {"inputs": inputs} if inputs else {}
    if case != "one level":  # the branch that upstream's encoder runs
        options.update(dac=False, pre_norm=True)
    artifact = sam3x.export(encoder, output=tmp_path / "out", interface="feature_maps", feature_sizes=sizes, **options)
    spec = make_spec(**artifact.manifest.spec)
    names = tuple(name for name in artifact.manifest.input_names if name not in ("dac", "pre_norm"))
    for batch, prompt_length, padding in ((1, 7, "some"), (2, 1, "none"), (4, 33, "some"), (2, 5, "all")):
        given = make_inputs(names, spec, 32, Sizes(batch=batch, tokens=0, prompt_length=prompt_length, padding=padding), 5)
        flags = {"dac": False, "pre_norm": True} if case == "one level" else {}
        before = {name: value.clone() for name, value in given.items()}
        got = artifact.run({**given, **flags})
        assert all(torch.equal(given[name], before[name]) for name in before)
        expected = upstream(encoder, given, sizes)
        assert set(got) == set(expected) == set(artifact.manifest.output_names)
        for name, value in expected.items():
            assert got[name].dtype == value.numpy().dtype, name
            np.testing.assert_allclose(got[name], value.numpy(), rtol=0, atol=2e-5, err_msg=name)


def test_levels_must_fit_the_encoder(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="1 feature levels, feature_sizes names 2"):
        sam3x.export(encoder_of(1), output=tmp_path / "out", interface="feature_maps", feature_sizes=((4, 4), (2, 2)))


def test_a_list_of_layers_takes_no_maps(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="takes no feature maps"):
        sam3x.export(list(encoder_of(1).layers), output=tmp_path / "out", interface="feature_maps", feature_sizes=((4, 4),))
