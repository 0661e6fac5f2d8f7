"""What a run of a .pte takes: one head's scores at a time, whatever is fixed and whatever is dynamic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import sam3x
from sam3x.capture.capture import capture
from sam3x.passes.attention import legalize_attention_for_pte, split_scores
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
        {"prompt_length": 9, "inputs": ALL_MASKS, **ONE_BRANCH},
        *(
            pytest.param(options, marks=pytest.mark.long)
            for options in (
                {},
                {"prompt_length": 9, "tokens": (16, TOKENS), **ONE_BRANCH},
                {"prompt_length": 9, "precision": "int8", **ONE_BRANCH},
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


@pytest.mark.long
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


BESIDE = ("tgt", "memory", "memory_key_padding_mask", "query_pos", "tgt_mask", "tgt_key_padding_mask")


@pytest.mark.long
@pytest.mark.parametrize("options", [{"inputs": BESIDE, "batch": (1, 2)}, {"inputs": ALL_MASKS, **ONE_BRANCH}], ids=str)
def test_a_mask_of_all_pairs_beside_padding_stands_in_memory_once(
    encoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """One float a pair, whatever the heads and images; the numbers are right where rows see no key, too."""
    pairs = TOKENS * TOKENS * 4
    monkeypatch.setattr(legalize_attention_for_pte, "SCORES", pairs)  # beside a mask: four parts
    sizes: dict[str, Any] = {"tokens": TOKENS, "prompt_length": (1, 9), "batch": 1, "pre_norm": "module"}
    made = sam3x.export(encoder, target="pte", output=tmp_path / "out", **{**sizes, **options}).manifest
    images = made.ranges["batch"][1]
    assert made.verified and made.metadata["delegates"] == 1
    assert made.metadata["planned_bytes"] <= 1.3 * pairs + 3 * images * TOKENS * WIDTH * 4 + 100_000
    assert made.metadata["workspace_bytes"] <= images * pairs / 4 + images * 8 * TOKENS * WIDTH * 4


@pytest.mark.parametrize(
    "inputs", [pytest.param(None, id="padding"), pytest.param(BESIDE, id="every mask of the tokens", marks=pytest.mark.long)]
)
def test_scores_of_a_dynamic_number_of_tokens_are_computed_in_parts(
    encoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: tuple[str, ...] | None
) -> None:
    """The parts follow from the largest number; the numbers are right for all, where the parts do not go up, too."""
    pairs = TOKENS * TOKENS * 4
    monkeypatch.setattr(split_scores, "SCORES", pairs * 2 // 3)
    sizes: dict[str, Any] = {"tokens": (5, TOKENS), "prompt_length": (1, 9), "batch": (1, 2), "dac": False, "pre_norm": True}
    given = {**sizes, **({"inputs": inputs} if inputs else {})}
    made = sam3x.export(encoder, target="pte", output=tmp_path / "out", **given).manifest
    assert made.verified and made.metadata["delegated_flops"] > 0.99
    assert made.metadata["delegates"] == len(encoder.layers) + 1
    assert made.metadata["workspace_bytes"] <= 2 * (pairs / 3 + 8 * TOKENS * WIDTH * 4)
    assert made.metadata["planned_bytes"] <= 2 * 8 * TOKENS * WIDTH * 4 + (1.8 * pairs if inputs else 0) + 100_000


BASE = ("tgt", "memory", "memory_key_padding_mask", "query_pos")
LIMIT = 200
"""MB that a run at 72x72 tokens may take above the loaded program."""

RUN = """
import json, re, sys
from pathlib import Path

import numpy as np

import sam3x

artifact, sizes = sam3x.load(sys.argv[1]), json.loads(sys.argv[2])
random, inputs = np.random.default_rng(0), {}
for item in artifact.manifest.inputs:
    shape = [sizes.get(dim, dim) for dim in item.shape]
    if item.name in ("dac", "pre_norm"):
        inputs[item.name] = np.asarray(item.name == "pre_norm" or sizes["batch"] % 2 == 0)
    else:
        numbers = random.standard_normal(shape, dtype=np.float32)
        inputs[item.name] = numbers > 9 if item.dtype == "bool" else numbers

def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024

artifact._runner  # loads it
Path("/proc/self/clear_refs").write_text("5")
loaded = memory("VmRSS")
artifact.run(inputs)
print(round((memory("VmHWM") - loaded) / 1e6))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch": 2, "dac": False},
        {"batch": 2, "dac": True},
        {"prompt_length": 32, "batch": 1, "dac": False},
        {"precision": "fp16"},
        {"precision": "int8"},
        {"tokens": (16, 5184)},
        {"tokens": (16, 5184), "batch": 1, "dac": False, "prompt_length": 32},
        {"inputs": (*BASE, "tgt_mask"), "batch": 1, "dac": False},
        {"inputs": BESIDE},
        {"inputs": BESIDE, "tokens": (16, 5184)},
        {"inputs": ALL_MASKS, "batch": 1, "dac": False},
    ],
    ids=str,
)
def test_a_run_of_72x72_tokens_holds_its_memory(options: dict[str, Any], tmp_path: Path) -> None:
    """One layer of SAM3's width, each number of images in a process of its own: the high-water mark above what is loaded."""
    encoder = encoder_of(1, d_model=256, num_heads=8, dim_feedforward=2048)
    given: dict[str, Any] = {"pre_norm": "module", **options}
    made = sam3x.export(encoder, target="pte", output=tmp_path / "out", verify="off", **given).manifest
    ends = {name: high for name, (_, high) in made.ranges.items()}
    taken = {}
    for images in sorted(set(made.ranges["batch"])):
        argv = [sys.executable, "-W", "ignore", "-c", RUN, str(tmp_path / "out"), json.dumps({**ends, "batch": images})]
        taken[images] = int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    print(f"{options}: MB for images: {taken}, arena {made.metadata['planned_bytes'] / 1e6:.0f} MB")
    assert max(taken.values()) <= LIMIT and made.metadata["planned_bytes"] <= 250e6
