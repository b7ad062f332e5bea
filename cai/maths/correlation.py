"""Correlation about zero of two principles' votes, with an interval that is clustered by topic.

The correlation is sum(x y) / sqrt(sum(x^2) sum(y^2)). Exchanging *a* and *b* of a pair flips the signs of all its
votes, which changes a correlation about the mean but not this one. The interval is that of the delete-one-topic
jackknife (Efron and Tibshirani 1993, chapter 11) on Fisher's scale z = atanh(r): z ± t sqrt((G - 1) / G * sum (z_g -
mean z)^2), G topics, t with G - 1 degrees of freedom. `tests/maths/test_correlation.py` simulates its coverage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from cai.maths.vote_aggregation import Floats, Ints

MAX_CORRELATION = 1 - 1e-12
"""Fisher's scale is infinite at 1."""


@dataclass(frozen=True)
class Correlation:
    """A correlation over `n` pairs about `topics` topics."""

    value: float
    n: int
    topics: int
    interval: tuple[float, float]
    """95 %; [-1, 1] where one topic alone holds all votes of a principle."""


def correlation_about_zero(x: Floats, y: Floats, topics: Ints, *, level: float = 0.95) -> Correlation | None:
    """The correlation of x and y; all are (pairs,), topics are numbers from 0. None where x or y is 0 throughout."""
    products = np.stack([x * y, x * x, y * y])
    by_topic = np.stack([np.bincount(topics, row) for row in products])[:, np.bincount(topics) > 0]
    n_topics = by_topic.shape[1]
    total = by_topic.sum(1)
    if not (total[1] > 0 and total[2] > 0):
        return None
    value = float(total[0] / np.sqrt(total[1] * total[2]))
    remaining = total[:, None] - by_topic
    interval = (-1.0, 1.0)
    if n_topics > 1 and (remaining[1:] > 1e-12 * total[1:, None]).all():
        without_topic = _fisher(remaining[0] / np.sqrt(remaining[1] * remaining[2]))
        error = np.sqrt((n_topics - 1) * without_topic.var())
        half_width = float(stdtrit(n_topics - 1, (1 + level) / 2) * error)
        z = float(_fisher(np.asarray(value)))
        interval = (float(np.tanh(z - half_width)), float(np.tanh(z + half_width)))
    return Correlation(value, len(x), n_topics, interval)


def _fisher(correlation: Floats) -> Floats:
    z: Floats = np.arctanh(np.clip(correlation, -MAX_CORRELATION, MAX_CORRELATION))
    return z
