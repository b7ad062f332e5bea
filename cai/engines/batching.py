"""Batches that stay within a budget of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CACHED = 4096
"""Tokens in one pass on a CPU: more of them leave its caches."""


def in_one_pass(budget: int, device: torch.device) -> int:
    """Tokens that are best read in one pass where `budget` of them may be held."""
    return min(budget, _CACHED) if device.type == "cpu" else budget


def batches(sizes: Sequence[int], budget: int, before: int = 0, room: float = math.inf) -> Iterator[tuple[int, int]]:
    """[first, last) of each batch of ascending `sizes` such that rows times the longest is at most `budget`.

    With `before` more tokens in each row it is at most `room`. One row alone may be longer.
    """
    first = 0
    for index, size in enumerate(sizes):
        rows = index + 1 - first
        if rows > 1 and (rows * size > budget or rows * (before + size) > room):
            yield first, index
            first = index
    if first < len(sizes):
        yield first, len(sizes)
