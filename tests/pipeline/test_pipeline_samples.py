"""What components are verified with costs what those asked for cost."""

from __future__ import annotations

import pytest

from sam3x.pipeline.compatibility import SMALL
from sam3x.pipeline.request import resolve_pipeline
from sam3x.pipeline.samples import samples_of
from sam3x.sources.contract import Component
from sam3x.sources.image import random_image_source


@pytest.mark.parametrize(
    ("chosen", "needed"),
    [
        (["text_encoder"], {"text_encoder"}),
        (["vision_encoder"], {"vision_encoder"}),
        (["fusion_encoder"], {"vision_encoder", "text_encoder", "prompt_encoder", "fusion_encoder"}),
    ],
    ids=lambda names: "+".join(sorted(names)),
)
def test_only_what_feeds_the_chosen_components_runs(
    chosen: list[str], needed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = resolve_pipeline("onnx", {}, components=chosen)
    model = random_image_source(SMALL)(request.spec)
    ran: set[str] = set()
    eager = Component.eager
    monkeypatch.setattr(Component, "eager", lambda self, inputs: (ran.add(self.name), eager(self, inputs))[1])
    samples = samples_of(model, request)
    assert ran == needed
    assert all(samples[name] for name in chosen)
