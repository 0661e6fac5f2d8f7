"""``python -m sam3x.demo.threshold``: choose the score above which the small model's answers count; training ends with it.

The validation set decides: pictures that are neither trained on nor those of the published figures.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from sam3x.demo import WEIGHTS
from sam3x.demo.checks import answers
from sam3x.demo.held_out import VALIDATION, held_out
from sam3x.demo.network import model
from sam3x.fidelity.score import score
from sam3x.sources.transformers.source import DETECTION_THRESHOLD

FALSE_ALARMS = 0.05
"""At most as many of the prompts for nothing are to be answered."""

_STEPS = [round(0.05 * step, 2) for step in range(4, 20)]


def choose(trained: Any, folder: Path, pictures: int = 2000) -> float:
    """The threshold with the best F1 of those with few enough false alarms; it goes into ``config.json`` of ``folder``.

    Thresholds are steps of 0.05. F1 is the harmonic mean of recall and precision: an object that is found twice is wrong once.
    """
    held = [held_out(index, of=VALIDATION) for index in range(pictures)]
    asked, found = [item for one in held for item in one.asked], answers(trained, held)
    allowed: dict[float, float] = {}
    for threshold in _STEPS:
        figures = score(asked, found, threshold)
        recall, precision, alarms = figures.recall or 0.0, figures.precision or 0.0, figures.false_alarms or 0.0
        f1 = 2 * recall * precision / max(recall + precision, 1e-9)
        print(
            f"threshold {threshold:.2f}: F1 {f1:.4f}, recall {recall:.4f}, precision {precision:.4f}, false alarms {alarms:.4f}"
        )
        if alarms <= FALSE_ALARMS:
            allowed[threshold] = f1
    threshold = max(allowed, key=lambda step: allowed[step], default=_STEPS[-1])
    path = folder / "config.json"
    config = {**json.loads(path.read_bytes()), DETECTION_THRESHOLD: threshold}
    new = folder / "config.json.new"
    new.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(new, path)
    return threshold


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sam3x.demo.threshold", description=__doc__)
    parser.add_argument("--pictures", type=int, default=2000, help="of the validation set")
    choose(model(), WEIGHTS, parser.parse_args().pictures)


if __name__ == "__main__":
    main()
