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
    """The lowest threshold, in steps of 0.05, with few enough false alarms; it goes into ``config.json`` of ``folder``."""
    held = [held_out(index, of=VALIDATION) for index in range(pictures)]
    asked, found = [item for one in held for item in one.asked], answers(trained, held)
    for threshold in _STEPS:
        figures = score(asked, found, threshold)
        shares = (figures.mask_iou, figures.recall, figures.false_alarms)
        words = ("mask IoU", "recall", "false alarms")
        told = [f"{name} {value:.4f}" for name, value in zip(words, shares, strict=True) if value is not None]
        print(f"threshold {threshold:.2f}: {', '.join(told)}", flush=True)
        if not figures.false_alarms or figures.false_alarms <= FALSE_ALARMS:
            break
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
