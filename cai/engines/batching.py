"""Batches that stay within a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches(sizes: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """[first, last) of each batch of ascending `sizes` such that rows times the longest is at most `budget`."""
    first = 0
    for index, size in enumerate(sizes):
        if index > first and (index + 1 - first) * size > budget:
            yield first, index
            first = index
    if first < len(sizes):
        yield first, len(sizes)
