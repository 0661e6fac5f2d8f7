"""What a run of a .pte takes: one head's scores at a time, whatever is fixed and whatever is dynamic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import sam3x
from sam3x.capture.capture import capture
from sam3x.passes.attention import legalize_attention_for_pte
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.pipeline.request import resolve
from support.upstream import encoder_of

TOKENS, WIDTH = 256, 32
ALL_MASKS = ("tgt", "memory", "tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "pos", "query_pos")

ONE_BRANCH: dict[str, Any] = {"dac": False, "pre_norm": "module"}


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return encoder_of(2)


def metadata_of(encoder: nn.Module, folder: Path, **options: Any) -> tuple[dict[str, Any], int]:
    """The metadata of the file, and the largest batch."""
    request = resolve("pte", {"tokens": TOKENS, "verify": "off", **options})
    spec, own, target = request.spec, request.options, request.target
    passes = default_pipeline(str(spec.branches)).then(*target.legalization_passes(own))
    return target.lower(passes.run(capture(encoder, spec))[0], folder / "x.pte", own) or {}, spec.batch[1]


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_length": 9},
        {"prompt_length": 9, "batch": 2, "dac": True, "pre_norm": True},
        {"prompt_length": 9, "tokens": (16, TOKENS), **ONE_BRANCH},
        {"prompt_length": 9, "precision": "int8", **ONE_BRANCH},
        {"prompt_length": 9, "inputs": ALL_MASKS, **ONE_BRANCH},
        *(
            pytest.param(options, marks=pytest.mark.long)
            for options in (
                {},
                {"prompt_length": 9, "batch": 1, "dac": False, "pre_norm": True},
                {"prompt_length": 9, "precision": "fp16"},
            )
        ),
    ],
    ids=str,
)
def test_a_fixed_prompt_takes_one_heads_scores_at_a_time(encoder: nn.Module, options: dict[str, Any], tmp_path: Path) -> None:
    """A view of the mask was a delegate of its own; the second one then held the scores of every head at once."""
    metadata, batch = metadata_of(encoder, tmp_path, **options)
    size = 2 if options.get("precision") == "fp16" else 4
    images = batch // 2 if options.get("dac") is True else batch
    scores, tokens = images * TOKENS * TOKENS * size, batch * TOKENS * WIDTH * 4
    if "inputs" not in options:  # where masks of all pairs are prepared, which stand in the arena head by head
        assert metadata["delegates"] == 1 and metadata["delegated_flops"] > 0.99
        assert metadata["planned_bytes"] <= 3 * tokens + 100_000
    assert metadata["workspace_bytes"] <= scores + 8 * tokens


def test_scores_past_a_budget_are_computed_in_parts(
    encoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the queries, of as many images as a run has, in the one delegate; the numbers are right in every branch."""
    parts = 3
    monkeypatch.setattr(legalize_attention_for_pte, "SCORES", TOKENS * TOKENS * 4 // parts + 1)
    sizes: dict[str, Any] = {"tokens": TOKENS, "prompt_length": (1, 9), "batch": (1, 2)}
    made = sam3x.export(encoder, target="pte", output=tmp_path / "out", pre_norm="module", **sizes).manifest
    assert made.verified and made.metadata["delegates"] == 1
    assert made.metadata["workspace_bytes"] <= 2 * TOKENS * TOKENS * 4 / parts + 2 * 8 * TOKENS * WIDTH * 4
