"""What a target has by default, and what every target tells of its numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sam3x.targets import registry
from sam3x.targets.base import Numerics, Target, TargetOptions, TargetStatus
from sam3x.targets.registry import get_target


class Plain:
    """A target that states no base class, as a package of another's may have it."""

    name, suffix = "plain", ".plain"

    def availability(self) -> TargetStatus:
        return TargetStatus(name=self.name, available=True, detail="", install="")

    def lower(self, captured: Any, path: Path, options: TargetOptions) -> None:
        path.write_text("plain")

    def load_runner(self, path: Path) -> Any:
        return None


def test_a_target_without_a_base_class_has_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [SimpleNamespace(name="plain", load=lambda: Plain)])
    target = get_target("plain")
    options = target.options_type()
    assert isinstance(target, Target) and isinstance(target, Plain) and target.name == "plain"
    assert target.file_name("decoder", options) == "decoder.plain" and target.unverifiable(options) is None
    assert target.numerics(options) == Numerics() and target.legalization_passes(options) == () and target.opset is None


@pytest.mark.parametrize(
    ("target", "options", "expected"),
    [
        ("onnx", {}, Numerics()),
        ("onnx", {"weights": "int8"}, Numerics(weights="int8")),
        ("pte", {"precision": "int8"}, Numerics(arithmetic="int8")),
        ("pte", {"precision": "fp16", "delegate": "coreml"}, Numerics(arithmetic="fp16")),
        ("trt", {"precision": "tf32"}, Numerics(arithmetic="tf32")),
    ],
    ids=str,
)
def test_what_is_stored_and_computed_in(target: str, options: dict[str, Any], expected: Numerics) -> None:
    back_end = get_target(target)
    assert back_end.numerics(back_end.options_type(**options)) == expected
    assert expected.below == options.get("precision", options.get("weights"))
