"""What a lower precision does to masks: a picture and prompts through the eager source and through the files, end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam3x.runtime.components import run_component
from sam3x.runtime.manifest import ComponentSpec, PromptQuality, Quality
from sam3x.runtime.pictures import sigmoid
from sam3x.sources.contract import ImageModel, walk
from sam3x.sources.names import INTERACTIVE_HEAD
from sam3x.targets.base import Runner

TOP = 5
"""Queries of each prompt whose masks are compared: those that eager scores highest."""

_BOXES = ((0.30, 0.35, 0.36, 0.40), (0.68, 0.60, 0.40, 0.52))
"""cx, cy, w, h as fractions: where the picture's two largest shapes are."""

_PROMPTS: tuple[tuple[str, int, tuple[int, ...]], ...] = (
    ("text", 1, ()),
    ("another text", 2, ()),
    ("a box", 0, (1,)),
    ("text and a box", 3, (1,)),
    ("a box wanted, a box not", 0, (1, 0)),
)
"""Name, seed of the text (0: one token alone), label of each of ``_BOXES`` that is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What eager gives for one prompt: the ``TOP`` queries, best first, their boxes, scores and masks."""

    name: str
    given: dict[str, np.ndarray]
    queries: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    masks: np.ndarray


def eager_answers(model: ImageModel, seed: int) -> list[Answer]:
    """The eager components' answers to every prompt about one seeded picture. All of the detector must be there."""
    answers: list[Answer] = []
    picture, vision = _picture(model.image_size, seed), None
    for name, words, labels in _PROMPTS:
        given = {"image": picture, **_prompt(model, seed, words, labels)}
        trace = walk(model.components, given, vision=vision)
        vision = trace["vision_encoder"]
        found = {key: value.numpy() for key, value in {**trace["decoder"][1], **trace["mask_head"][1]}.items()}
        scores = _scores(found)
        best = np.argsort(-scores, kind="stable")[:TOP]
        answers.append(
            Answer(
                name=name,
                given={key: value.numpy() for key, value in given.items()},
                queries=best,
                boxes=found["pred_boxes"][0, best],
                scores=scores[best],
                masks=found["pred_masks"][0, best] > 0,
            )
        )
    return answers


def quality_of(
    answers: Sequence[Answer], components: Sequence[ComponentSpec], load: Callable[[str], Runner], precision: str
) -> Quality:
    """Run the files on what eager was asked, one after another, each opened once and closed before the next.

    Args:
        components: all of a pipeline's, in order, joined or not. load: opens a component's file.
    """
    every = np.array([-1.0], dtype=np.float32)  # a joined file gives what scores above it: all queries, in their order
    states: list[dict[str, Any]] = [{**answer.given, "threshold": every} for answer in answers]
    for spec in (item for item in components if item.name != INTERACTIVE_HEAD):
        runner = load(spec.file)
        first: dict[str, np.ndarray] = {}
        for state, answer in zip(states, answers, strict=True):
            if spec.name == "mask_head":
                state["queries"] = state["queries"][:, answer.queries]
            if spec.name != "vision_encoder" or not first:  # one picture
                first = run_component(spec, runner, state)
            state.update(first)
    prompts = tuple(_compared(answer, state) for answer, state in zip(answers, states, strict=True))
    return Quality(
        precision=precision,
        picture="seeded shapes on a gradient",
        prompts=prompts,
        mean_iou=round(float(np.mean([item.mean_iou for item in prompts])), 6),
        min_iou=min(item.min_iou for item in prompts),
        largest_box_difference=max(item.largest_box_difference for item in prompts),
        largest_score_difference=max(item.largest_score_difference for item in prompts),
    )


def _compared(answer: Answer, state: dict[str, Any]) -> PromptQuality:
    if "found_masks" in state:
        boxes, scores, masks = (state[name][answer.queries] for name in ("found_boxes", "found_scores", "found_masks"))
    else:
        boxes, scores = state["pred_boxes"][0, answer.queries], _scores(state)[answer.queries]
        masks = state["pred_masks"][0]
    overlaps = [iou(*pair) for pair in zip(masks > 0, answer.masks, strict=True)]
    return PromptQuality(
        prompt=answer.name,
        queries=len(overlaps),
        mean_iou=round(float(np.mean(overlaps)), 6),
        min_iou=round(min(overlaps), 6),
        largest_box_difference=round(float(np.abs(boxes - answer.boxes).max()), 6),
        largest_score_difference=round(float(np.abs(scores - answer.scores).max()), 6),
    )


def iou(left: np.ndarray, right: np.ndarray) -> float:
    """Intersection over union of two bool masks; two empty ones are equal."""
    union = int((left | right).sum())
    return float((left & right).sum() / union) if union else 1.0


def _scores(found: dict[str, Any]) -> np.ndarray:
    """Of the first prompt's queries, 0 to 1."""
    return (sigmoid(found["pred_logits"]) * sigmoid(found["presence_logit_dec"]))[0]


def _picture(size: int, seed: int) -> Tensor:
    """(1, 3, size, size), as the vision encoder takes it: a smooth background, ``_BOXES`` filled, and grain."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand((1, 3, 4, 4), generator=generator) * 1.2 - 0.6
    picture = torch.nn.functional.interpolate(rough, (size, size), mode="bicubic", align_corners=False)
    for left, top, right, bottom in ((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) for cx, cy, w, h in _BOXES):
        rows, columns = slice(round(top * size), round(bottom * size)), slice(round(left * size), round(right * size))
        picture[:, :, rows, columns] = torch.rand((1, 3, 1, 1), generator=generator) * 2 - 1
    return (picture + 0.05 * torch.randn(picture.shape, generator=generator)).clamp(-1, 1)


def _prompt(model: ImageModel, seed: int, words: int, labels: Sequence[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + words)
    count = min(model.context_length, 3 + words) if words else 1
    length = model.context_length if model.fixed_length else count
    ids = torch.full((1, length), model.pad_id)
    ids[:, :count] = torch.randint(1, model.vocab_size, (1, count), generator=generator)
    boxes = len(labels) or 1
    return {
        "input_ids": ids,
        "attention_mask": torch.arange(length)[None] < count,
        "boxes": torch.tensor(_BOXES[:boxes])[None],
        "box_labels": torch.tensor([list(labels) or [1]]),
        "box_mask": torch.full((1, boxes), not labels),
    }
