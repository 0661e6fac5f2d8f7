"""``python -m sam3x.demo.train``: train the small SAM3, resumable at any step; ``make demo-model`` runs it.

The learning rate stays high and falls in the last ``cooldown`` steps, so that a run can be made longer: give more ``--steps``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam3x.demo import WEIGHTS
from sam3x.demo.batches import Batch, batch
from sam3x.demo.checks import check
from sam3x.demo.curve import draw_curve
from sam3x.demo.held_out import held_out
from sam3x.demo.losses import Probes, mask_losses, matched, set_losses
from sam3x.demo.network import WIDTH, answer, masks, save, untrained
from sam3x.demo.threshold import choose

_CHECKPOINT, _HISTORY, _CURVE = "checkpoint.pt", "history.jsonl", "curve.png"
_WARM_UP = 200
_CHECKED_FROM = 10_000  # checks in training look at held-out pictures beyond those of the published figures


def losses_of(model: Any, probes: Probes, given: Batch, most: int) -> dict[str, Tensor]:
    """Every loss of a batch, weighted.

    Args:
        most: prompts whose masks are computed; a mask costs most of a step.
    """
    answered = answer(model, given.pixels, given.asked)
    pairs = matched(answered, given.wanted)
    found = {**probes(answered, given.wanted), **set_losses(answered, given.wanted, pairs)}
    hit = torch.nonzero(given.wanted.there.any(dim=1)).squeeze(1)
    hit = hit[:: max(1, len(hit) // most)][:most]
    if len(hit):
        rows, queries, shapes = pairs[-1]
        of = torch.zeros(given.wanted.there.shape, dtype=torch.long)
        of[rows, shapes] = queries
        logits, everything = masks(model, answered, given.asked.picture, hit, of[hit])
        found |= mask_losses(logits, everything, given.wanted.coverage[hit], given.wanted.there[hit])
    return found


class Training:
    """Model, optimizer and moving average, one checkpoint on disk."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        torch.manual_seed(options.seed)
        self.model: Any = untrained(options.seed)
        self.probes = Probes(WIDTH)
        self.average: Any = copy.deepcopy(self.model).eval()
        self.step, self.seconds = 0, 0.0
        decayed = [value for value in self._parameters() if value.dim() > 1]
        others = [value for value in self._parameters() if value.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98), fused=True)
        self.history: list[dict[str, Any]] = []
        path = options.state / _CHECKPOINT
        if path.is_file():
            stored = torch.load(path, weights_only=True)
            self.model.load_state_dict(stored["model"])
            self.probes.load_state_dict(stored["probes"])
            self.average.load_state_dict(stored["average"])
            self.optimizer.load_state_dict(stored["optimizer"])
            self.step, self.seconds, self.history = stored["step"], stored["seconds"], stored["history"]
        elif options.begin is not None:
            from safetensors.torch import load_file

            weights = {name: value.float() for name, value in load_file(options.begin / "model.safetensors").items()}
            self.model.load_state_dict(weights)
            self.average.load_state_dict(weights)

    def _parameters(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *self.probes.parameters()]

    def rate(self) -> float:
        """The learning rate of the next step: warm-up, constant, then down to nothing."""
        left = (self.options.steps - self.step) / max(1, self.options.cooldown)
        return self.options.rate * min(1.0, (self.step + 1) / _WARM_UP, max(left, 0.01))

    def advance(self) -> dict[str, float]:
        """One step."""
        options = self.options
        self.model.train()
        given = batch(options.seed, self.step, options.pictures, options.prompts)
        found = losses_of(self.model, self.probes, given, options.masks)
        total = torch.stack(list(found.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters(), 5.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        self.step += 1
        keep = min(0.998, self.step / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
        return {name: float(value.detach()) for name, value in {**found, "total": total, "norm": norm}.items()}

    def store(self) -> None:
        """The checkpoint, whole or not at all, the curve beside it."""
        folder: Path = self.options.state
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "probes": self.probes.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
        }
        torch.save(state, folder / f"{_CHECKPOINT}.new")
        os.replace(folder / f"{_CHECKPOINT}.new", folder / _CHECKPOINT)
        (folder / _HISTORY).write_text("".join(json.dumps(line) + "\n" for line in self.history))
        draw_curve(self.history, folder / _CURVE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sam3x.demo.train", description=__doc__)
    parser.add_argument("--state", type=Path, default=Path("build/demo-model"), help="folder of the checkpoint and the curve")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="folder of the finished weights")
    parser.add_argument("--begin", type=Path, help="folder of weights to begin with, as --output wrote it")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--cooldown", type=int, default=6_000, help="last steps, in which the learning rate falls")
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=2, help="of each picture")
    parser.add_argument("--masks", type=int, default=8, help="prompts of a step whose masks are computed")
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=int, default=250, help="steps from one check to the next")
    parser.add_argument("--checked", type=int, default=64, help="pictures of a check")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    training = Training(options)
    held = [held_out(_CHECKED_FROM + index) for index in range(options.checked)]
    sums: dict[str, float] = {}
    while training.step < options.steps:
        started = time.perf_counter()
        for name, value in training.advance().items():
            sums[name] = sums.get(name, 0.0) + value
        training.seconds += time.perf_counter() - started
        if training.step % options.check and training.step < options.steps:
            continue
        figures = check(training.average, held)
        count = (training.step - 1) % options.check + 1
        means = {name: round(value / count, 4) for name, value in sums.items()}
        sums = {}
        line = {"step": training.step, "seconds": round(training.seconds), "rate": training.rate(), **means}
        for name in ("box_ap50", "mask_ap50", "mask_iou", "recall", "false_alarms"):
            value = getattr(figures, name)
            line[name] = None if value is None else round(value, 4)
        training.history.append(line)
        training.store()
        print(json.dumps(line), flush=True)
    save(training.average, options.output)
    choose(training.average, options.output)


if __name__ == "__main__":
    main()
