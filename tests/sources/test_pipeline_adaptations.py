"""What upstream's code needs to be traced: the same numbers, one name at a time, put back; and the trap each one is for."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from sam3x.fusion.shadow import shadow_of
from sam3x.sources import adaptations
from sam3x.sources.image import draw_image_weights
from sam3x.sources.image_model import _geometry_encoder
from sam3x.sources.meta.source import private_shadow
from support.image_model import TINY

GRID, PROMPTS, BOXES = 8, 3, 2


@pytest.fixture(scope="module")
def geometry() -> nn.Module:
    encoder = _geometry_encoder(TINY).eval()
    draw_image_weights(encoder, 1)
    return encoder


def run(encoder: nn.Module, boxes: Tensor, labels: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Upstream's geometry encoder; boxes (B, N, 4), tokens (1, N, C)."""
    prompts = len(boxes)
    prompt = SimpleNamespace(
        box_embeddings=boxes.transpose(0, 1),
        box_labels=labels.transpose(0, 1),
        box_mask=mask,
        point_embeddings=boxes.new_zeros((0, prompts, 2)),
        point_mask=torch.zeros((prompts, 0), dtype=torch.bool),
        point_labels=torch.zeros((0, prompts), dtype=torch.long),
        mask_embeddings=None,
        mask_mask=None,
        mask_labels=None,
    )
    features = tokens.transpose(0, 1).expand(-1, prompts, -1)
    with torch.no_grad(), adaptations.unpinned():
        return encoder(prompt, [features], [(GRID, GRID)], [torch.ones_like(features)])


def test_all_adaptations_together_give_upstreams_numbers(geometry: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand((PROMPTS, BOXES, 4), generator=generator) * 0.4 + 0.2
    labels = torch.randint(0, 2, (PROMPTS, BOXES), generator=generator)
    mask = torch.tensor([[False, False], [False, True], [True, True]])
    tokens = torch.randn((1, GRID * GRID, TINY.d_model), generator=generator)
    wanted, wanted_mask = run(geometry, boxes, labels, mask, tokens)
    shadow = shadow_of(geometry)
    adaptations.without_points(shadow)
    adaptations.boxes_of_one_picture(shadow, batch_first=False)
    with adaptations.symbolic_sizes(shadow), adaptations.no_empty_joins(shadow):
        got, got_mask = run(shadow, boxes, labels, mask, tokens)
    assert torch.equal(got_mask, wanted_mask)
    valid = ~wanted_mask.transpose(0, 1)
    torch.testing.assert_close(got[valid], wanted[valid], atol=1e-5, rtol=0)
    assert "_encode_boxes" not in geometry.__dict__ and "_encode_points" not in geometry.__dict__


def test_what_was_changed_is_put_back_also_after_an_error(geometry: nn.Module) -> None:
    from sam3.model import geometry_encoders, position_encoding

    before = torch.Tensor.pin_memory, geometry_encoders.concat_padded_sequences
    contexts = (
        adaptations.unpinned(),
        adaptations.symbolic_sizes(geometry.pos_enc),
        adaptations.no_empty_joins(geometry),
    )
    for context in contexts:
        with pytest.raises(ZeroDivisionError), context:
            raise ZeroDivisionError
    assert (torch.Tensor.pin_memory, geometry_encoders.concat_padded_sequences) == before
    assert "len" not in vars(position_encoding)


class Positions(nn.Module):
    def __init__(self, encoding: nn.Module) -> None:
        super().__init__()
        self.encoding = encoding

    def forward(self, x: Tensor) -> Tensor:
        return self.encoding._encode_xy(x, x)[0]  # type: ignore[operator]


def test_len_bakes_in_the_number_of_boxes(geometry: nn.Module) -> None:
    positions = Positions(geometry.pos_enc)
    example, dynamic = (torch.rand(6),), {"x": {0: Dim.DYNAMIC}}
    with pytest.raises(Exception, match=r"specialized|constant"):
        torch.export.export(positions, example, dynamic_shapes=dynamic)
    with adaptations.symbolic_sizes(geometry.pos_enc):
        program = torch.export.export(positions, example, dynamic_shapes=dynamic)
    assert program.module()(torch.rand(9)).shape[0] == 9


def test_an_empty_first_sequence_is_no_join(geometry: nn.Module) -> None:
    from sam3.model import geometry_encoders

    boxes, mask = torch.rand(4, 2, 3), torch.tensor([[False, False, True, True], [False, False, False, True]])
    empty = torch.zeros(0, 2, 3), torch.zeros((2, 0), dtype=torch.bool)
    wanted, wanted_mask = geometry_encoders.concat_padded_sequences(*empty, boxes, mask)
    with adaptations.no_empty_joins(geometry):
        got, got_mask = geometry_encoders.concat_padded_sequences(*empty, boxes, mask)
        assert got is boxes
        joined, _ = geometry_encoders.concat_padded_sequences(boxes, mask, boxes, mask)
    assert torch.equal(got, wanted) and torch.equal(got_mask, wanted_mask) and joined.shape[0] == 8


def test_a_model_that_has_seen_a_picture_is_traced_as_a_new_one(tiny_model: nn.Module) -> None:
    """Upstream's decoder keeps coordinates, and their size as tensors, whose values a trace cannot ask for."""
    used: Any = copy.deepcopy(tiny_model.transformer.decoder)
    boxes, size = torch.rand(4, 1, 4), (torch.tensor(8), torch.tensor(8))
    used._get_rpb_matrix(boxes, size)
    assert isinstance(used.compilable_stored_size[0], Tensor)
    shadow: Any = private_shadow(used)
    stored = (shadow.compilable_stored_size, shadow.compilable_cord_cache)
    assert stored == (None, None) and used.compilable_cord_cache is not None
    shadow._get_rpb_matrix(boxes, (8, 8))
    assert shadow.compilable_stored_size == (8, 8) and private_shadow(shadow).compilable_stored_size == (8, 8)


def test_upstream_pins_memory_even_without_a_box(geometry: nn.Module) -> None:
    if torch.cuda.is_available():
        pytest.skip("pinning works where there is CUDA")
    nothing = torch.zeros((1, 0, 4)), torch.zeros((1, 0), dtype=torch.long), torch.zeros((1, 0), dtype=torch.bool)
    prompt = SimpleNamespace(box_embeddings=nothing[0].transpose(0, 1), box_labels=nothing[1].T, box_mask=nothing[2])
    with pytest.raises(RuntimeError):
        geometry._encode_boxes(prompt.box_embeddings, prompt.box_mask, prompt.box_labels, torch.rand(1, TINY.d_model, 8, 8))  # type: ignore[operator]
