"""The figures of several pipelines on the same pictures, as a document and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sam3x.fidelity.measure import Against
from sam3x.fidelity.score import Figures

POINT = 0.01
"""A loss of AP50 above which a contender is marked."""

COLUMNS = (
    "pipeline",
    "AP50 of boxes",
    "AP50 of masks",
    "mask IoU of hits",
    "found of what is there",
    "right of what is answered",
    "false alarms",
    "mask IoU with the first",
    "worst",
    "lost, gained",
    "MB",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A pipeline measured: ``megabytes`` of its model files (None: emulated), ``against`` the first (None: it is the first).

    ``same_weights``: it was exported from those of the first.
    """

    name: str
    megabytes: float | None
    figures: Figures
    against: Against | None
    same_weights: bool = True


def document(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """JSON-ready."""
    return [asdict(item) for item in contenders]


def rows(contenders: Sequence[Contender]) -> list[list[str]]:
    """A row a contender, in the order of ``COLUMNS``."""
    return [
        [
            item.name,
            _share(item.figures.box_ap50) + (" *" if loses(item, contenders[0]) else ""),
            _share(item.figures.mask_ap50),
            _share(item.figures.mask_iou),
            _share(item.figures.recall),
            _share(item.figures.precision),
            _share(item.figures.false_alarms),
            "" if item.against is None else _share(item.against.mask_iou),
            "" if item.against is None else _share(item.against.worst_iou),
            "" if item.against is None else f"{item.against.lost}, {item.against.gained}",
            "" if item.megabytes is None else f"{item.megabytes:.1f}",
        ]
        for item in contenders
    ]


def loses(item: Contender, first: Contender) -> bool:
    """Whether the AP50 of its boxes or masks is more than ``POINT`` below that of the first."""
    pairs = (
        (item.figures.box_ap50, first.figures.box_ap50),
        (item.figures.mask_ap50, first.figures.mask_ap50),
    )
    return any(own is not None and best is not None and own < best - POINT for own, best in pairs)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def markdown(contenders: Sequence[Contender], command: str, pictures: str, left_out: Sequence[str] = ()) -> str:
    """The page ``docs/fidelity.md``.

    Args:
        command: the one that makes it. pictures: whose they are. left_out: what could not be exported, and why.
    """
    first = contenders[0].figures
    marked = [item.name for item in contenders if loses(item, contenders[0])]
    verdict = (
        f"Marked with *: more than {POINT * 100:.0f} point of AP50 below the first ({', '.join(marked)})."
        if marked
        else f"None loses more than {POINT * 100:.0f} point of AP50 against the first."
    )
    others = [item.name for item in contenders if not item.same_weights]
    lines = [
        "# What a precision costs",
        "",
        f"`{command}` makes this page. The pictures are those of {pictures}: {first.pictures}, {first.prompts} prompts, "
        f"{first.objects} annotated objects.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(row)} |" for row in rows(contenders)),
        "",
        verdict,
        "",
        *(line for item in left_out for line in (f"Left out: {item}", "")),
        *([f"Exported from other weights than the first: {', '.join(others)}.", ""] if others else []),
        "AP50 is COCO's, by pycocotools, the mean over phrases, of all answers; the other columns are of answers above the "
        "model's own threshold. A hit is an answer whose mask overlaps an annotated one by half, or whose box does where "
        "boxes alone are annotated. Found of what is there: annotated objects that were hit (recall). Right of what is "
        "answered: answers that are hits (precision). False alarms: prompts for nothing in the picture that were answered. "
        "The last columns compare masks with those of the first pipeline, of all that it found: mean and worst IoU, where "
        "what was not found again counts 0, and how many were lost and gained.",
    ]
    return "\n".join(lines) + "\n"
