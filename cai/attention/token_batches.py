"""Batches that stay within a budget of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence


def batch_by_tokens(
    lengths: Sequence[int], max_tokens: int, *, prefix_length: int = 0, max_tokens_with_prefix: float = math.inf
) -> Iterator[tuple[int, int]]:
    """[first, last) of each batch of the ascending `lengths`, in tokens, padded to its longest row.

    A batch has at most `max_tokens` tokens, and at most `max_tokens_with_prefix` together with the prefix of
    `prefix_length` tokens that each of its rows continues. A single row may be longer.
    """
    first = 0
    for index, length in enumerate(lengths):
        n_rows = index + 1 - first
        if n_rows > 1 and (n_rows * length > max_tokens or n_rows * (prefix_length + length) > max_tokens_with_prefix):
            yield first, index
            first = index
    if first < len(lengths):
        yield first, len(lengths)
