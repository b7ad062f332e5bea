"""From a judge's votes to one log-odds a pair: pure functions over numpy arrays, no model and no file.

For principle *i* and order *o* a vote is the log-odds, in nats, that response *a* is better. The mean log-odds of both
orders cancels an additive position bias; the mean probability would not. The log-odds of a pair is
l = sum of w_i l_i / T over the principles that voted on it. T is the sum of those weights (a weighted mean) or a
constant.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
FloatOrArray = TypeVar("FloatOrArray", float, Floats)


class VoteColumns(NamedTuple):
    """Votes as columns, each of shape (votes,)."""

    pair: Ints
    """Index of the pair."""
    principle: Ints
    """Index of the principle."""
    swapped: Bools
    """Whether *b* was shown first."""
    log_odds: Floats
    """Log-odds that *a* is better, in nats."""


def log_odds_by_order(columns: VoteColumns, n_pairs: int, n_principles: int) -> tuple[Floats, Floats]:
    """Log-odds with *a* shown first and with *b* shown first, each of shape (pairs, principles).

    Both are NaN where a principle does not have exactly one vote on the pair in each order.
    """
    cell = columns.pair * n_principles + columns.principle
    n_cells = n_pairs * n_principles
    counts, sums = [], []
    for in_order in (~columns.swapped, columns.swapped):
        counts.append(np.bincount(cell[in_order], minlength=n_cells))
        sums.append(np.bincount(cell[in_order], columns.log_odds[in_order], minlength=n_cells))
    is_complete = (counts[0] == 1) & (counts[1] == 1)
    ab, ba = (np.where(is_complete, total, np.nan).reshape(n_pairs, n_principles) for total in sums)
    return ab, ba


def mean_over_orders(ab: FloatOrArray, ba: FloatOrArray) -> FloatOrArray:
    """Mean log-odds of both orders, which cancels an additive position bias; NaN where either is NaN."""
    return (ab + ba) / 2


def aggregate_votes(
    log_odds: Floats, weights: Floats, *, temperature: float | None = None, abstain_below: float = 0.0
) -> Floats:
    """Log-odds of each pair, (pairs,), from those of its principles, (pairs, principles), NaN where one did not vote.

    `weights` is (principles,). Principles of weight 0, without a vote, or within `abstain_below` nats of even leave
    both sums. The result is NaN where no principle is left. A `temperature` of None divides by the sum of weights.
    """
    counts = has_say(log_odds, weights, abstain_below)
    total = np.where(counts, weights * log_odds, 0.0).sum(axis=1)
    scale = (counts * weights).sum(axis=1) if temperature is None else np.full(len(log_odds), temperature)
    aggregated: Floats = np.divide(total, scale, out=np.full(len(log_odds), np.nan), where=counts.any(axis=1))
    return aggregated


def has_say(log_odds: Floats, weights: Floats, abstain_below: float = 0.0) -> Bools:
    """Which principles count in a pair's log-odds, (pairs, principles); arguments as of `aggregate_votes`."""
    counts: Bools = ~np.isnan(log_odds) & (weights > 0) & ~(np.abs(log_odds) < abstain_below)
    return counts


def sigmoid(log_odds: Floats) -> Floats:
    """The probability 1 / (1 + exp(-log_odds)) without overflow; NaN stays NaN."""
    with np.errstate(invalid="ignore"):
        p: Floats = np.exp(-np.logaddexp(0.0, -log_odds))
    return p
