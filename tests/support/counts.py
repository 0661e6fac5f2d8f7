"""What the oracle has counted in this process, and what is too much of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

COUNTS: Counter[str] = Counter()
"""``<target> configurations`` exported, ``<target> comparisons`` made, ``<target> refusals`` that are told in the docs."""
BUILDER_FAILED = "failures of the builder's own"
"""Its crashes and broken assertions (``BuilderError``): counted, for no export of ours is wrong by them."""


def too_many_failures(counts: Mapping[str, int]) -> str | None:
    """A target whose builder failed on more than one configuration in ten, of thirty at least: a lowering that got worse.

    Runs of ``make fuzz`` met one or two in a hundred.
    """
    for name, failed in counts.items():
        target, _, what = name.partition(" ")
        tried = counts.get(f"{target} configurations", 0)
        if what == BUILDER_FAILED and tried >= 30 and failed > tried / 10:
            return (
                f"{target}: its builder failed on {failed} of {tried} configurations, which is more than its own bugs explain"
            )
    return None
