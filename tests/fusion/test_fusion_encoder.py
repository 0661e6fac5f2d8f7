"""What counts as an encoder, which layers are alike, and how the user's module is used without being changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam3x
from sam3x.capture.samples import Sizes, make_inputs
from sam3x.errors import SourceError, SpecError
from sam3x.fusion.encoder import FusionEncoder, layers_of
from sam3x.fusion.layer_template import kind_of
from sam3x.fusion.shadow import shadow_of
from sam3x.spec import make_spec
from support.upstream import assert_equal_to_upstream, encoder_of

SIZES = Sizes(batch=2, tokens=20, prompt_length=4)


def test_encoder_list_and_single_layer_are_encoders() -> None:
    encoder = encoder_of(3)
    assert layers_of(encoder) == list(encoder.layers)
    assert layers_of(list(encoder.layers)) == list(encoder.layers)
    assert layers_of(nn.ModuleList(encoder.layers)) == list(encoder.layers)
    assert layers_of(encoder.layers[1]) == [encoder.layers[1]]


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), [], nn.ModuleList(), [nn.ReLU()]], ids=str)
def test_what_is_no_encoder(wrong: Any) -> None:
    with pytest.raises(SourceError, match="step 1/4 source"):
        layers_of(wrong)


def test_the_shadow_shares_every_tensor_and_is_in_eval_mode() -> None:
    encoder = encoder_of(2).train()
    shadow = shadow_of(encoder)
    assert {n: p.data_ptr() for n, p in shadow.named_parameters()} == {n: p.data_ptr() for n, p in encoder.named_parameters()}
    assert not any(module.training for module in shadow.modules())
    assert all(module.training for module in encoder.modules())
    shadow.layers[0].pre_norm = False
    shadow.layers[0].linear1 = nn.Identity()
    assert encoder.layers[0].pre_norm is True
    assert isinstance(encoder.layers[0].linear1, nn.Linear)


def test_a_compiled_forward_gives_way_to_the_class(tmp_path: Path) -> None:
    encoder = encoder_of(1)
    encoder.forward = torch.compile(encoder.forward)
    own = encoder.forward
    sam3x.export(encoder, output=tmp_path / "out", interface="feature_maps", feature_sizes=((4, 4),))
    assert encoder.forward is own


def test_half_precision_and_other_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"is torch\.float16.*module\.float\(\)"):
        sam3x.export(encoder_of(1).half(), output=tmp_path / "out")
    with pytest.raises(SourceError, match="is on meta"):
        FusionEncoder(encoder_of(1).to("meta"), make_spec())


def test_a_single_layer_and_upstreams_plain_encoder_export(tmp_path: Path) -> None:
    from sam3.model.encoder import TransformerEncoder

    layer = encoder_of(1).layers[0]
    plain = TransformerEncoder(layer=layer, num_layers=2, d_model=32, num_feature_levels=1).eval()
    for source, layers in ((layer, [layer]), (plain, list(plain.layers))):
        artifact = sam3x.export(source, output=tmp_path / "out")
        spec = make_spec(**artifact.manifest.spec)
        inputs = make_inputs(spec.inputs, spec, 32, SIZES, 2)
        got = artifact.run({**inputs, "dac": True, "pre_norm": True})["output"]
        assert_equal_to_upstream(got, layers, inputs, dac=True, pre_norm=True)


def test_layers_with_other_weights_are_alike_and_others_are_not() -> None:
    layers = list(encoder_of(2).layers)
    assert kind_of(layers[0], ()) == kind_of(layers[1], ())
    assert kind_of(layers[0], ("dac",)) != kind_of(layers[1], ())
    changes = {
        "pre_norm": lambda x: setattr(x, "pre_norm", False),
        "a private attribute of the attention": lambda x: setattr(x.self_attn, "_scale", 0.5),
        "eps": lambda x: setattr(x.norm1, "eps", 1e-3),
        "activation": lambda x: setattr(x, "activation", torch.nn.functional.gelu),
        "class": lambda x: setattr(x, "__class__", type("Other", (type(x),), {})),
        "tied weights": lambda x: setattr(x.norm2, "weight", x.norm1.weight),
        "hook": lambda x: x.linear1.register_forward_hook(lambda *_: None),
        "width": lambda x: setattr(x, "linear1", nn.Linear(32, 48)),
    }
    for name, change in changes.items():
        other = copy.deepcopy(layers[1])
        change(other)
        assert kind_of(layers[0], ()) != kind_of(other, ()), name


class Twice(nn.Module):
    """A fusion layer of its own: no attention, and ``tgt`` moved by what the prompt's mean says."""

    d_model = 32

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.pre_norm = True

    def forward(self, tgt: Tensor, memory: Tensor, **kwargs: Any) -> Tensor:
        return tgt + self.linear(tgt) * memory.mean(1, keepdim=True)


def test_a_layer_with_a_forward_of_its_own(tmp_path: Path) -> None:
    layer = Twice().eval()
    artifact = sam3x.export([layer, encoder_of(1).layers[0]], output=tmp_path / "out", dac=False, pre_norm="module")
    assert any("Twice" in note for note in artifact.manifest.notes)


def test_dac_over_tokens_is_not_defined_for_such_layers(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="dac_dim=1 is not defined for Twice"):
        sam3x.export([Twice().eval()], output=tmp_path / "out", dac_dim=1)
