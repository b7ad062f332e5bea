"""From a judge's votes to one label a pair: pure functions over numpy arrays, no model and no file.

For principle *i* and order *o* a vote is the log-odds, in nats, that response *a* is better. Averaging log-odds over
both orders cancels a preference for a position that adds to them; averaging probabilities would not. A pair's log-odds
is l = sum of w_i l_i / T over the principles that voted on it, T the sum of those weights (a weighted mean) or a
constant.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class VoteColumns(NamedTuple):
    """Votes as columns, all of shape (votes,)."""

    pair: Ints
    principle: Ints
    swapped: Bools
    """Whether *b* was shown first."""
    log_odds: Floats
    """That *a* is better."""


def by_order(vote_columns: VoteColumns, n_pairs: int, n_principles: int) -> tuple[Floats, Floats]:
    """Log-odds with *a* and with *b* shown first, (pairs, principles) each.

    NaN in both where there is not exactly one vote in each order.
    """
    cell = vote_columns.pair * n_principles + vote_columns.principle
    size = n_pairs * n_principles
    sides = [
        (
            np.bincount(cell[shown], minlength=size),
            np.bincount(cell[shown], vote_columns.log_odds[shown], minlength=size),
        )
        for shown in (~vote_columns.swapped, vote_columns.swapped)
    ]
    whole = (sides[0][0] == 1) & (sides[1][0] == 1)
    ab, ba = (np.where(whole, total, np.nan).reshape(n_pairs, n_principles) for _, total in sides)
    return ab, ba


def over_orders(vote_columns: VoteColumns, n_pairs: int, n_principles: int) -> Floats:
    """Mean log-odds of both orders, (pairs, principles); NaN where there is not exactly one vote in each order."""
    ab, ba = by_order(vote_columns, n_pairs, n_principles)
    return (ab + ba) / 2


def aggregate(
    votes: Floats, weights: Floats, *, temperature: float | None = None, abstain_below: float = 0.0
) -> Floats:
    """Log-odds of each pair, (pairs,), from `votes` (pairs, principles; NaN = none) and `weights` (principles,).

    Principles of weight 0, without a vote, or within `abstain_below` nats of even leave both sums; NaN where all do.
    """
    counted = ~np.isnan(votes) & (weights > 0) & ~(np.abs(votes) < abstain_below)
    total = np.where(counted, weights * votes, 0.0).sum(axis=1)
    scale = (counted * weights).sum(axis=1) if temperature is None else np.full(len(votes), temperature)
    log_odds: Floats = np.divide(total, scale, out=np.full(len(votes), np.nan), where=counted.any(axis=1))
    return log_odds


def probability(log_odds: Floats) -> Floats:
    """1 / (1 + exp(-log_odds)) without overflow; NaN stays NaN."""
    with np.errstate(invalid="ignore"):
        p: Floats = np.exp(-np.logaddexp(0.0, -log_odds))
    return p
