"""Artifacts under load and under bad inputs: many calls from many threads, NaN and infinity, wrong names, shapes and types."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sam3x
from sam3x.errors import ArtifactError
from sam3x.fusion.encoder import FusionEncoder
from sam3x.spec import make_spec

CALLS, THREADS = 1000, 4


@pytest.fixture(scope="module", params=["onnx", "pte"])
def artifact(request: pytest.FixtureRequest, default_artifact: Path, small_encoder: nn.Module, tmp_path_factory: Any) -> Any:
    if request.param == "onnx":
        return sam3x.load(default_artifact)
    folder = tmp_path_factory.mktemp("pte") / "out"
    return sam3x.export(small_encoder, target="pte", output=folder, tokens=(16, 64), batch=(1, 4), verify="off")


def inputs_of(seed: int, batch: int = 2, tokens: int = 20, prompt: int = 4) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "tgt": random.standard_normal((batch, tokens, 32), np.float32),
        "memory": random.standard_normal((batch, prompt, 32), np.float32),
        "memory_key_padding_mask": np.arange(prompt)[None] >= random.integers(1, prompt + 1, (batch, 1)),
        "query_pos": random.standard_normal((batch, tokens, 32), np.float32),
        "dac": bool(seed % 2),
        "pre_norm": bool(seed // 2 % 2),
    }


def resident() -> int:
    """kB of this process in memory now."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def test_a_thousand_runs_from_several_threads(artifact: sam3x.Artifact) -> None:
    """Every one gives what it gives alone, sizes and branches mixed, and memory stays where it was after the first hundred."""
    given = [inputs_of(seed, batch=2 + 2 * (seed % 2), tokens=16 + seed, prompt=1 + seed) for seed in range(8)]
    alone = [artifact.run(inputs)["output"].copy() for inputs in given]
    wrong: list[Any] = []

    def work(first: int, calls: int) -> None:
        for turn in range(calls):
            which = (first + turn) % len(given)
            try:
                if not np.array_equal(artifact.run(given[which])["output"], alone[which]):
                    wrong.append(which)
            except BaseException as error:
                wrong.append(error)

    def together(calls: int) -> None:
        threads = [threading.Thread(target=work, args=(first, calls // THREADS)) for first in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    together(CALLS // 10)
    gc.collect()
    before = resident()
    together(CALLS)
    gc.collect()
    assert not wrong
    assert resident() - before < 8_000


def test_outputs_are_the_callers_own(artifact: sam3x.Artifact) -> None:
    """A later run does not write into them."""
    first = artifact.run(inputs_of(0))["output"]
    kept = first.copy()
    artifact.run(inputs_of(1))
    np.testing.assert_array_equal(first, kept)


def test_inputs_are_left_alone(artifact: sam3x.Artifact) -> None:
    inputs = inputs_of(0)
    before = {name: np.copy(value) for name, value in inputs.items()}
    artifact.run(inputs)
    assert all(np.array_equal(inputs[name], before[name]) for name in before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("name", ["tgt", "memory", "query_pos"])
def test_what_is_not_finite_stays_in_its_item(
    bad: float, name: str, artifact: sam3x.Artifact, small_encoder: nn.Module
) -> None:
    """The other items of the batch are what they are without it, and where eager is not finite the item is not either."""
    encoder = FusionEncoder(small_encoder, make_spec())
    inputs = {**inputs_of(3, batch=4), "dac": False}
    clean = artifact.run(inputs)["output"]
    inputs[name] = inputs[name].copy()
    inputs[name][1, 0, 0] = bad
    got = artifact.run(inputs)["output"]
    eager = encoder.eager({key: torch.as_tensor(value) for key, value in inputs.items()})["output"].numpy()
    others = [0, 2, 3]
    np.testing.assert_allclose(got[others], clean[others], rtol=0, atol=2e-5)
    assert not np.isfinite(got[1][~np.isfinite(eager[1])]).any()
    both = np.isfinite(got[1]) & np.isfinite(eager[1])
    np.testing.assert_allclose(got[1][both], eager[1][both], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"tgt": None}, r"'tgt'.*expected float32"),
        ({"tgt": "image"}, r"'tgt' has dtype <U5, expected float32 \['batch', 'tokens', 32\]"),
        ({"tgt": [[1.0], [1.0, 2.0]]}, r"'tgt'.*expected float32"),
        ({"tgt": np.zeros((2, 20, 32), np.float16)}, r"'tgt' has dtype float16, expected float32"),
        ({"tgt": np.zeros((2, 20, 32), ">f4")}, r"'tgt' has dtype >f4, expected float32"),
        ({"tgt": np.zeros((2, 20, 31), np.float32)}, r"'tgt' has shape \[2, 20, 31\], expected \['batch', 'tokens', 32\]"),
        ({"tgt": np.zeros((0, 20, 32), np.float32)}, r"'batch' is 1 to"),
        ({"memory": np.zeros((2, 0, 32), np.float32)}, r"'prompt_length' is 1 to 77"),
        ({"memory": np.zeros((2, 78, 32), np.float32)}, r"'memory' has shape \[2, 78, 32\].*'prompt_length' is 1 to 77"),
        ({"memory_key_padding_mask": np.zeros((2, 4), np.uint8)}, r"'memory_key_padding_mask' has dtype uint8, expected bool"),
        ({"memory_key_padding_mask": np.zeros((2, 5), bool)}, r"'memory_key_padding_mask'.*the same in every input"),
        ({"dac": np.array([True])}, r"'dac' has shape \[1\], expected \[\]"),
        ({"pre_norm": "yes"}, r"'pre_norm' has dtype <U3, expected bool"),
        ({"query": 1}, r"unknown \['query'\]\. This artifact takes \['tgt', 'memory'"),
        ({"tgt": torch.zeros(2, 20, 32, dtype=torch.bfloat16)}, r"'tgt'.*bfloat16.*expected float32"),
        ({"tgt": torch.zeros(2, 20, 32).to_sparse()}, r"'tgt'.*expected float32"),
        ({"tgt": torch.zeros(2, 20, 32, device="meta")}, r"'tgt'.*expected float32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_inputs_name_the_input_and_what_was_expected(artifact: sam3x.Artifact, change: dict[str, Any], fact: str) -> None:
    with pytest.raises(ArtifactError, match=fact) as caught:
        artifact.run({**inputs_of(0), **change})
    assert str(caught.value).startswith("run: ")


def test_missing_inputs_are_named(artifact: sam3x.Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"inputs missing \['tgt', 'dac'\]"):
        artifact.run({name: value for name, value in inputs_of(0).items() if name not in ("tgt", "dac")})


@pytest.mark.parametrize("inputs", [None, [], "tgt", 3])
def test_inputs_that_are_no_mapping(artifact: sam3x.Artifact, inputs: Any) -> None:
    with pytest.raises(ArtifactError, match="run: "):
        artifact.run(inputs)


def test_arrays_that_are_not_contiguous(artifact: sam3x.Artifact) -> None:
    inputs = inputs_of(0)
    odd = {**inputs, "tgt": np.asfortranarray(inputs["tgt"]), "memory": np.flip(np.flip(inputs["memory"], 1).copy(), 1)}
    np.testing.assert_array_equal(artifact.run(odd)["output"], artifact.run(inputs)["output"])
