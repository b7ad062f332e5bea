"""Whether an accuracy differs from chance: that of choices between two, of which chance gets one half right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

AgainstChance = Literal["better than chance", "worse than chance", "not distinguishable from chance"]


def against_chance(interval: Sequence[float]) -> AgainstChance:
    """How an accuracy with this 95 % interval, (low, high), compares to chance."""
    low, high = interval
    if low <= 0.5 <= high:
        return "not distinguishable from chance"
    return "better than chance" if low > 0.5 else "worse than chance"
