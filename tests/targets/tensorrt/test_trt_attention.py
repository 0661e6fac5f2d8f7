"""``--attention explicit``: in half precision products around a softmax in float32, in place of a layer that TensorRT fuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.trt import captured, lower


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_no_attention_layer_is_left_and_each_softmax_is_between_casts(precision: str, tmp_path: Path) -> None:
    found = lower(captured("select"), tmp_path / "x.engine", precision=precision, attention="explicit")
    assert (found["attention_layers"], found["layers"]["softmax"], found["left_to_torch"]) == (0, 4, 0)
    assert found["layers"]["cast"] >= 8  # scores up, weights down


def test_scores_keep_the_budget_in_half_precision_too(tmp_path: Path) -> None:
    found = lower(captured("select"), tmp_path / "x.engine", precision="fp16", attention="explicit", attention_memory="20KB")
    assert found["tiled_attention_loops"] == 2 and found["attention_layers"] == 0
