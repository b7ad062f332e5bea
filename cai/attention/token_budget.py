"""How many tokens are computed at once: a number that is halved where memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MIN_TOKENS = 512
"""A machine whose memory does not hold these is too small for the model."""


class TokenBudget:
    """At most `n_tokens` at once; `owner` is whose they are, in words. What is learned of memory is kept for later."""

    def __init__(self, n_tokens: int, owner: str) -> None:
        self.n_tokens, self.owner = n_tokens, owner

    def run(
        self, items: Sequence[Item], compute: Callable[[Sequence[Item], int], Iterator[tuple[int, Result]]]
    ) -> Iterator[tuple[int, Result]]:
        """(index, result) of every item, from `compute(items, n_tokens)`; with half the tokens where memory runs out.

        Results that `compute` has given are kept. Raises its error where it needs memory for fewer than `MIN_TOKENS`.
        """
        from accelerate.utils.memory import clear_device_cache

        pending = list(range(len(items)))
        while pending:
            completed: set[int] = set()
            try:
                for index, result in compute([items[n] for n in pending], self.n_tokens):
                    completed.add(pending[index])
                    yield pending[index], result
                assert len(completed) == len(pending), "some items got no result"
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.n_tokens < MIN_TOKENS:
                    raise
                self.n_tokens //= 2
                smaller = f"going on with {self.n_tokens:,} tokens at once"
                warnings.warn(f"{self.owner}: memory ran out; {smaller}", stacklevel=2)
                clear_device_cache(garbage_collection=True)
            pending = [n for n in pending if n not in completed]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    from accelerate.utils.memory import should_reduce_batch_size

    # oneDNN, which multiplies on CPUs, raises "could not create a primitive" (and the like) where it gets no memory.
    return isinstance(error, MemoryError) or should_reduce_batch_size(error) or "could not create a" in str(error)
