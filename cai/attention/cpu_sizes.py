"""Batches that stay within a budget of tokens, and their sizes on a CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

_CACHED = 4096
"""Tokens in one pass on a CPU: more of them leave its caches."""


def in_one_pass(budget: int, device: torch.device) -> int:
    """Tokens that are best read in one pass where `budget` of them may be held."""
    return min(budget, _CACHED) if device.type == "cpu" else budget


def pad_to_multiple(size: int, dtype: torch.dtype, device: torch.device, step: int = 32) -> int:
    """The size, `size` or a little more, in which so many rows are best multiplied, or so many columns best weighed.

    Where sizes count, that is a multiple of `step`, or a power of two below it.
    """
    if not size or not prefers_padded_sizes(dtype, device):
        return size
    return 1 << (size - 1).bit_length() if size < step else -(-size // step) * step


def prefers_padded_sizes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether some sizes take much longer than others.

    In bfloat16 on a CPU they do. For a product of a new size oneDNN compiles a kernel, for 1 to 6 ms: ten times what
    the product takes in a small model. And 32 numbers fill a vector: a softmax over rows of 190 takes twice the time of
    one over 192, because what is left of each row is computed number by number.
    """
    return device.type == "cpu" and dtype == torch.bfloat16


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
