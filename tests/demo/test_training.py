"""The training: seeded, resumed to the bit after a kill, and its losses fall; the weights that are kept."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sam3x.demo import WEIGHTS, model
from sam3x.demo.batches import batch
from sam3x.demo.held_out import VALIDATION, held_out
from sam3x.demo.losses import corners, overlaps
from sam3x.demo.network import VOCABULARY, answer, tokenize, untrained
from sam3x.demo.threshold import choose
from sam3x.demo.train import Training


def options(folder: Path, **changes: object) -> argparse.Namespace:
    given = {"seed": 0, "rate": 1e-3, "state": folder, "begin": None, "steps": 40, "cooldown": 10}
    return argparse.Namespace(**{**given, "pictures": 2, "prompts": 3, "masks": 2, **changes})


def test_a_resumed_training_gives_the_same_weights(tmp_path: Path) -> None:
    straight = Training(options(tmp_path / "a"))
    for _ in range(3):
        straight.advance()
    stopped = Training(options(tmp_path / "b"))
    stopped.advance()
    stopped.store()
    stopped.advance()  # lost: a kill comes before the next checkpoint
    resumed = Training(options(tmp_path / "b"))
    assert resumed.step == 1
    for _ in range(2):
        resumed.advance()
    for left, right in ((straight.model, resumed.model), (straight.average, resumed.average)):
        for name, value in left.state_dict().items():
            torch.testing.assert_close(right.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_training_goes_on_from_the_weights_that_are_kept(tmp_path: Path) -> None:
    begun = Training(options(tmp_path, begin=WEIGHTS))
    kept = model().state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in begun.model.state_dict().items())
    fresh = Training(options(tmp_path))
    assert begun.advance()["total"] < 0.6 * fresh.advance()["total"]


def test_batches_are_seeded_and_their_targets_fit() -> None:
    one, same, other = batch(0, 7, 3, 4), batch(0, 7, 3, 4), batch(0, 8, 3, 4)
    assert torch.equal(one.pixels, same.pixels) and torch.equal(one.wanted.coverage, same.wanted.coverage)
    assert not torch.equal(one.pixels, other.pixels)
    assert one.asked.picture.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    rows, places = torch.nonzero(one.wanted.there, as_tuple=True)
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        mask = one.wanted.coverage[row, place] > 0.5
        y, x = torch.nonzero(mask, as_tuple=True)
        around = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1]) / mask.shape[0]
        assert (corners(one.wanted.boxes[row, place]) - around).abs().max() < 0.03


def test_overlaps_of_boxes_are_torchvisions() -> None:
    from torchvision.ops import box_iou, generalized_box_iou

    corner = torch.rand((2, 6, 2), generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([corner, corner + 0.1 + torch.rand((2, 6, 2), generator=torch.Generator().manual_seed(1))], dim=-1)
    plain, wide = overlaps(boxes[0][:, None], boxes[1][None])
    torch.testing.assert_close(plain, box_iou(*boxes))
    torch.testing.assert_close(wide, generalized_box_iou(*boxes))


def test_the_trained_model_is_small_and_whole() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 6e6
    trained = model()
    assert type(trained).__name__ == "Sam3Model" and not trained.training
    assert 1e6 < sum(value.numel() for value in trained.parameters()) < 4e6
    assert all(torch.isfinite(value).all() for value in trained.parameters())
    assert {name: value.shape for name, value in trained.state_dict().items()} == {
        name: value.shape for name, value in untrained().state_dict().items()
    }


@pytest.mark.parametrize("text", ["red circle", "Striped  SQUARES", "dog", "a red star", "visual", "plain white cross"])
def test_training_reads_words_as_the_runtime_does(text: str) -> None:
    from sam3x.runtime.text import Tokenizer

    ids, valid = tokenize([text, "dotted purple triangles"])
    kept = Tokenizer(WEIGHTS / "tokenizer.json", 8, unescape_html=False)(text)
    assert ids[0][valid[0]].tolist() == kept and ids.max() < len(VOCABULARY)


def test_training_computes_what_transformers_does() -> None:
    """Prompts of two pictures at once, against ``Sam3Model.forward`` one by one."""
    trained, given = model(), batch(0, 3, 2, 4)
    with torch.no_grad():
        answered = answer(trained, given.pixels, given.asked)
        for row, picture in enumerate(given.asked.picture.tolist()):
            asked, kept = given.asked, given.asked.given[row]
            valid = asked.valid[row]
            boxes = {"input_boxes": asked.boxes[row, kept][None], "input_boxes_labels": asked.labels[row, kept][None]}
            out = trained(
                pixel_values=given.pixels[picture][None],
                input_ids=asked.ids[row, valid][None],
                attention_mask=torch.ones((1, int(valid.sum())), dtype=torch.long),
                **(boxes if kept.any() else {}),
            )
            np.testing.assert_allclose(answered.logits[-1, row], out.pred_logits[0], atol=2e-4)
            np.testing.assert_allclose(corners(answered.boxes[-1, row]), out.pred_boxes[0], atol=2e-5)
            np.testing.assert_allclose(answered.presence[-1, row], out.presence_logits[0, 0], atol=2e-4)


def test_the_threshold_is_chosen_on_pictures_of_its_own_and_stands_in_the_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(WEIGHTS, folder)
    chosen = choose(model(), folder, pictures=12)
    before, after = (json.loads((path / "config.json").read_text()) for path in (WEIGHTS, folder))
    assert 0.2 <= chosen < 1 and after == {**before, "detection_threshold": chosen}
    assert not np.array_equal(held_out(0).drawn.pixels, held_out(0, of=VALIDATION).drawn.pixels)
