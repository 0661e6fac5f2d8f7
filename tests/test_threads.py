"""Exports in several threads of one process: each is right, and torch is left as it was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import sam3x
from sam3x import api
from sam3x.errors import SpecError
from support.upstream import encoder_of


def settings_of_torch() -> tuple[object, ...]:
    return (
        torch.backends.mha.get_fastpath_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
    )


def test_two_exports_in_two_threads_and_a_refusal_beside_them(tmp_path: Path) -> None:
    before = settings_of_torch()
    encoders = [encoder_of(1, seed=seed) for seed in (1, 2)]

    def export(index: int) -> bool:
        options = {"dac": False, "pre_norm": "module", "tokens": (16, 64)}
        made = sam3x.export(encoders[index], output=tmp_path / str(index), **options)  # type: ignore[arg-type]
        return made.manifest.verified

    def refused(_: int) -> str:
        try:
            sam3x.export(encoders[0], output=tmp_path / "refused", dac=True, batch=3)
        except SpecError as error:
            return error.fact
        return ""

    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(export, 0), pool.submit(export, 1), pool.submit(refused, 0)]
        assert [item.result() for item in done[:2]] == [True, True] and "odd size 3" in done[2].result()
    assert settings_of_torch() == before
    for index, encoder in enumerate(encoders):
        assert all(record.passed for record in api.verify(tmp_path / str(index), encoder))
