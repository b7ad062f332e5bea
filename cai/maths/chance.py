"""Whether an accuracy differs from chance: that of choices between two, of which chance gets one half right."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

AgainstChance = Literal["better than chance", "worse than chance", "not distinguishable from chance"]


def against_chance(interval: Sequence[float]) -> AgainstChance:
    """How an accuracy with this 95 % interval, (low, high), compares to chance."""
    low, high = interval
    if low <= 0.5 <= high:
        return "not distinguishable from chance"
    return "better than chance" if low > 0.5 else "worse than chance"


def can_beat_chance(n: int, clusters: Sequence[str] | None = None) -> bool:
    """Whether `n` choices, in these clusters or each by itself, would be better than chance if all were right."""
    from cai.maths.statistics import rate  # scipy, which printing a table does not need

    return against_chance(rate([1.0] * n, clusters).interval) == "better than chance"


def n_to_beat_chance() -> int:
    """The fewest independent choices that are better than chance if all are right."""
    return next(n for n in itertools.count(1) if can_beat_chance(n))
