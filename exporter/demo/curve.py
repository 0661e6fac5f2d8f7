"""The curve of a training as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LINES = {"box_ap50": "AP50 of boxes", "mask_iou": "mask IoU of hits", "recall": "recall", "false_alarms": "false alarms"}


def draw_curve(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Figures on held-out pictures and the training loss over steps, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    steps = [line["step"] for line in history]
    for name, label in _LINES.items():
        upper.plot(steps, [line[name] if line[name] is not None else float("nan") for line in history], label=label)
    upper.axhline(0.9, color="gray", linewidth=0.6, linestyle="--")
    upper.axhline(0.05, color="gray", linewidth=0.6, linestyle="--")
    upper.set_ylim(0, 1)
    upper.legend(loc="center right")
    upper.set_title("on held-out pictures, moving average of the weights")
    lower.plot(steps, [line["total"] for line in history], color="black", label="training loss")
    lower.set_yscale("log")
    lower.set_xlabel("steps")
    lower.legend()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
