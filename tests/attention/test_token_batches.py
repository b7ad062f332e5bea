"""Batches of ascending lengths stay within their budget of tokens."""

from __future__ import annotations

from cai.attention.token_batches import batch_by_tokens


def test_batches_stay_within_the_token_budget() -> None:
    lengths = sorted([5, 9, 3, 12, 40, 7, 7, 200])
    batches = list(batch_by_tokens(lengths, 40))
    assert [length for first, last in batches for length in lengths[first:last]] == lengths
    assert all((last - first) * lengths[last - 1] <= 40 or last - first == 1 for first, last in batches)
    assert list(batch_by_tokens([], 40)) == []
