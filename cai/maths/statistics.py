"""Rates, differences and win rates over prompts that share topics, with intervals that stay honest with few topics.

Twenty prompts about one topic are not twenty independent observations, so every interval here is clustered. The two
usual methods fail for rates close to 0 or 1, the most common ones in this project: a cluster bootstrap and a plain
cluster-robust error both give an interval of width zero when every response is right. The method here is

- Wilson's score interval (Wilson 1927), which stays inside [0, 1] and keeps a width at its ends,
- with the effective sample size n / deff, deff = 1 + (m - 1) * rho, m = sum(m_g^2) / n (Kish 1965, section 8.2),
- rho from the cluster-robust variance, shrunk towards 1 with the weight of one topic: rho* = (k * rho + 1) / (k + 1),
  where k = (sum r_g^2)^2 / sum r_g^4 is the number of topics that the variance estimate rests on. Without any event k
  is 0 and every topic counts once; with many topics the shrinkage disappears,
- and Student's t with one degree of freedom less than there are topics (Korn and Graubard 1998).

Simulated coverage of the nominal 95 % over p in {0.02, 0.2, 0.5, 0.98}, 5 to 200 topics, rho from 0 to 1, equal and
very unequal topics: 0.90 at worst (where Wilson's own discreteness bites: 5 topics, p = 0.02), mostly 0.95 to 0.99;
without shrinking rho it falls to 0.83, with a plain cluster-robust error to 0.10. `tests/maths/test_statistics.py`
repeats a part of the simulation.

Left out: models with random effects, bootstraps, anything that uses random numbers. Every function is a pure function
of its arguments, and the order of rows does not change a result, to the last bit.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit

from cai.maths.vote_aggregation import mean_over_orders

Floats = NDArray[np.float64]
Clusters = Sequence[str] | None
"""The topic of each row; None makes each row its own cluster."""
Verdict = Literal["a better", "b better", "not distinguishable"]


class RateFigure(TypedDict):
    """A `Rate` as JSON. Shares lie in [0, 1], amounts (words, hedges) do not."""

    value: float | None
    n: int
    topics: int
    interval: list[float]
    missing: NotRequired[int]
    """Absent, like `bounds`, where nothing is missing."""
    bounds: NotRequired[list[float]]


@dataclass(frozen=True)
class Rate:
    """A mean over `n` rows about `topics` topics. `value` is None, and the interval [0, 1], where there are no rows."""

    value: float | None
    n: int
    topics: int
    interval: tuple[float, float]
    missing: int = 0
    """Rows without a value because something failed."""

    @property
    def bounds(self) -> tuple[float, float]:
        """The `worst_case` of this rate: its value if every missing row were 0, and if every one were 1."""
        return worst_case((self.value or 0.0) * self.n, self.n, self.missing)

    def as_json(self) -> RateFigure:
        """The rate as JSON, the interval as [low, high]."""
        figure: RateFigure = {"value": self.value, "n": self.n, "topics": self.topics, "interval": list(self.interval)}
        return {**figure, "missing": self.missing, "bounds": list(self.bounds)} if self.missing else figure


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over rows measured on both. `p_value` is two-sided, against no difference."""

    value: float | None
    n: int
    topics: int
    interval: tuple[float, float]
    p_value: float
    verdict: Verdict


@dataclass(frozen=True)
class WinRate:
    """Head to head, a against b: a tie counts half. `p_value` is two-sided, against 1/2."""

    rate: Rate
    wins: int
    ties: int
    losses: int
    p_value: float
    verdict: Verdict


def worst_case(total: float, n: int, missing: int) -> tuple[float, float]:
    """The mean of `n` rows that add up to `total`, if each of `missing` others were 0, and if each were 1.

    These bounds assume nothing about why rows are missing (Manski 1989, Anatomy of the selection problem).
    """
    n_rows = n + missing
    return (total / n_rows, (total + missing) / n_rows) if n_rows else (0.0, 1.0)


def rate(values: Sequence[float], clusters: Clusters = None, *, missing: int = 0, level: float = 0.95) -> Rate:
    """Mean of values in [0, 1] (yes or no, probabilities, or halves for ties), clustered by `clusters`.

    `clusters` names each row's topic; None makes each row its own cluster. One topic alone says nothing about others,
    so its interval is [0, 1]. Failed rows, `missing`, only enter the worst-case bounds, not the mean or the interval.
    Raises ValueError for values outside [0, 1] or a different number of clusters.
    """
    table = _Table.of(values, clusters)
    if table is None:
        return Rate(None, 0, 0, (0.0, 1.0), missing)
    if table.low < 0 or table.high > 1:
        raise ValueError(f"a rate is over values in [0, 1], found {table.low} to {table.high}")
    low, high = score_interval(table.sums, table.squares, table.sizes, level=level)
    return Rate(table.mean, table.n, table.topics, (float(low), float(high)), missing)


def distinct_share(texts: Sequence[str], clusters: Sequence[str], *, level: float = 0.95) -> Rate:
    """Number of different texts over the number of texts. It falls with n: compare it between equal numbers only.

    The share is no mean over rows, since whether a text is a repetition depends on the others. Its variance is that of
    the delete-one-topic jackknife (Efron and Tibshirani 1993, chapter 11), v = (G - 1) / G * sum (s_g - mean s)^2. The
    interval is Wilson's with p (1 - p) / v rows, at most one a text, or with one row a topic where v is 0.
    """
    if len(texts) != len(clusters):
        raise ValueError(f"one cluster a text: found {len(texts)} texts and {len(clusters)} clusters")
    if not texts:
        return Rate(None, 0, 0, (0.0, 1.0))
    sizes, topics_by_text = Counter(clusters), defaultdict[str, set[str]](set)
    for text, topic in zip(texts, clusters, strict=True):
        topics_by_text[text].add(topic)
    n_exclusive = Counter(next(iter(topics)) for topics in topics_by_text.values() if len(topics) == 1)
    n, n_topics, n_different = len(texts), len(sizes), len(topics_by_text)
    share = n_different / n
    if n_topics < 2:
        return Rate(share, n, n_topics, (0.0, 1.0))
    shares_without = np.array([(n_different - n_exclusive[topic]) / (n - sizes[topic]) for topic in sorted(sizes)])
    variance = float((n_topics - 1) * shares_without.var())
    n_effective = min(share * (1 - share) / variance, float(n)) if variance > 0 and share < 1 else float(n_topics)
    low, high = _wilson_interval(np.float64(share), n_effective, _t_quantile(level, n_topics))
    return Rate(share, n, n_topics, (float(low), float(high)))


def mean(values: Sequence[float], clusters: Clusters = None, *, level: float = 0.95) -> Rate:
    """Mean of values without bounds (a length in words): mean ± t * cluster-robust error, t with topics - 1 degrees.

    The standard error is sqrt(G / (G - 1) * sum r_g^2) / n, r_g the sum of a cluster's residuals (Liang and Zeger 1986;
    Miller 2024, arXiv 2411.00640, section 2.2, has it without the factor for few clusters). Raises ValueError for rows
    of fewer than two clusters: nothing bounds such an interval.
    """
    table = _Table.of(values, clusters)
    if table is None or table.topics < 2:
        raise ValueError("an interval of an unbounded mean needs rows of at least two clusters")
    residuals = table.sums - table.sizes * table.mean
    standard_error = float(np.sqrt(table.topics / (table.topics - 1) * (residuals**2).sum()) / table.n)
    half_width = float(_t_quantile(level, table.topics)) * standard_error
    return Rate(table.mean, table.n, table.topics, (table.mean - half_width, table.mean + half_width))


def paired_difference(
    a: Sequence[float], b: Sequence[float], clusters: Clusters = None, *, level: float = 0.95
) -> Difference:
    """a - b, row by row, for values in [0, 1] measured on the same prompts.

    The difference d lies in [-1, 1]; (d + 1) / 2 lies in [0, 1] and gets the interval of `rate`. Pairing removes the
    variation that both share. Equal columns give a difference of 0 with a narrow interval, never a division by zero.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired difference is over the same rows, found {len(a)} and {len(b)}")
    halved = (np.asarray(a, dtype=float) - np.asarray(b, dtype=float) + 1) / 2
    table = _Table.of(halved, clusters)
    if table is None:
        return Difference(None, 0, 0, (-1.0, 1.0), 1.0, "not distinguishable")
    if table.low < 0 or table.high > 1:
        raise ValueError("a paired difference is over values in [0, 1]")
    low, high = score_interval(table.sums, table.squares, table.sizes, level=level)
    p_value = _score_p_value(table, 0.5)
    difference = 2 * table.mean - 1
    interval = (float(2 * low - 1), float(2 * high - 1))
    return Difference(difference, table.n, table.topics, interval, p_value, verdict(difference, p_value, level))


def win_rate(outcomes: Sequence[float], clusters: Clusters = None, *, missing: int = 0, level: float = 0.95) -> WinRate:
    """Share of comparisons that a won, from outcomes 1 (a won), 0 (b won) and anything between (a tie, 1/2).

    Outcomes may be probabilities that a is better; their mean is then AlpacaEval 2's win rate.
    """
    table = _Table.of(outcomes, clusters)
    estimate = rate(outcomes, clusters, missing=missing, level=level)
    wins, losses = (sum(1 for value in outcomes if value == end) for end in (1, 0))
    p_value = 1.0 if table is None else _score_p_value(table, 0.5)
    lead = 0.0 if estimate.value is None else estimate.value - 0.5
    return WinRate(estimate, wins, len(outcomes) - wins - losses, losses, p_value, verdict(lead, p_value, level))


def outcome(log_odds_ab: float, log_odds_ba: float, tie_below: float = 0.0) -> float:
    """1 if a won, 0 if b won, 1/2 for a tie, from the log-odds (nats) that a is better, one for each order.

    A mean of both orders within `tie_below` nats of even is a tie.
    """
    lead = mean_over_orders(log_odds_ab, log_odds_ba)
    return 0.5 if abs(lead) <= tie_below else float(lead > 0)


def verdict(difference: float | None, p_value: float, level: float = 0.95) -> Verdict:
    """Which of a and b is better, or that they are not distinguishable at this level."""
    if not difference or p_value > 1 - level:
        return "not distinguishable"
    return "a better" if difference > 0 else "b better"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979) of several comparisons, in the order of `p_values`."""
    order = np.argsort(np.asarray(p_values, dtype=float), kind="stable")
    adjusted = [0.0] * len(order)
    largest = 0.0
    for position, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(order) - position)))
        adjusted[index] = largest
    return adjusted


def score_interval(
    sums: ArrayLike, squares: ArrayLike, sizes: ArrayLike, *, level: float = 0.95
) -> tuple[Floats, Floats]:
    """The interval of `rate` from sums, for any number of data sets at once.

    sums (..., G) per cluster, squares (...) sum of squared values, sizes (G,) rows a cluster -> low (...), high (...).
    """
    sums, sizes = np.asarray(sums, dtype=float), np.asarray(sizes, dtype=float)
    value = sums.sum(-1) / sizes.sum()
    if sizes.size < 2:
        return np.zeros_like(value), np.ones_like(value)
    return _wilson_interval(value, effective_size(sums, squares, sizes), _t_quantile(level, sizes.size))


def _wilson_interval(value: ArrayLike, n: ArrayLike, t: np.float64) -> tuple[Floats, Floats]:
    """Wilson's score interval of shares `value` of `n` rows, with the quantile t in place of the normal one."""
    value, n = np.asarray(value, dtype=float), np.asarray(n, dtype=float)
    shrinkage = 1 + t**2 / n
    centre = (value + t**2 / (2 * n)) / shrinkage
    half_width = t / shrinkage * np.sqrt(value * (1 - value) / n + (t / (2 * n)) ** 2)
    # Rounding would leave 1e-19 where an end is exactly 0 or 1; the mean always lies inside.
    low = np.where(value <= 0, 0.0, np.clip(centre - half_width, 0.0, value))
    high = np.where(value >= 1, 1.0, np.clip(centre + half_width, value, 1.0))
    return low, high


def effective_size(sums: ArrayLike, squares: ArrayLike, sizes: ArrayLike) -> Floats:
    """Number of independent yes-or-no answers with the same variance: p (1 - p) over that of the clustered mean.

    Shapes as in `score_interval`. Values between 0 and 1 vary less than yes or no, so each counts for more than one.
    """
    sums, squares, sizes = (np.asarray(x, dtype=float) for x in (sums, squares, sizes))
    n, n_clusters = sizes.sum(), sizes.size
    value = sums.sum(-1) / n
    binary = value * (1 - value)
    scatter = np.maximum(squares - n * value**2, 0.0)
    scatter = np.where(scatter < 1e-12 * n, 0.0, scatter)  # equal values leave only rounding errors
    residuals = sums - sizes * value[..., None]
    second_moment, fourth_moment = (residuals**2).sum(-1), (residuals**4).sum(-1)
    kish_size = (sizes**2).sum() / n
    is_estimable = (scatter > 0) & (fourth_moment > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        k = np.where(is_estimable, second_moment**2 / fourth_moment, 0.0)
        deff = n_clusters / (n_clusters - 1) * second_moment / scatter if n_clusters > 1 else np.ones_like(value)
        rho = np.clip((deff - 1) / (kish_size - 1), 0.0, 1.0) if kish_size > 1 else np.zeros_like(value)
    rho = (np.where(is_estimable, rho, 0.0) * k + 1) / (k + 1)
    # One pseudo-row with the variance of yes or no keeps the interval of equal values (all ties) from vanishing.
    variance = (scatter + binary) / (n + 1)
    variance_ratio = np.where(binary > 0, binary / np.where(variance > 0, variance, 1.0), 1.0)
    n_effective: Floats = n / (1 + (kish_size - 1) * rho) * variance_ratio
    return n_effective


def _t_quantile(level: float, clusters: int) -> np.float64:
    return np.float64(stdtrit(clusters - 1, (1 + level) / 2))


def _score_p_value(table: _Table, null: float) -> float:
    """Two-sided p-value of the score test whose inversion the interval is."""
    if table.topics < 2:
        return 1.0
    n = effective_size(table.sums, table.squares, table.sizes)
    statistic = abs(table.mean - null) / np.sqrt(null * (1 - null) / n)
    return float(2 * stdtr(table.topics - 1, -statistic))


@dataclass(frozen=True)
class _Table:
    """Rows summed by cluster."""

    sums: Floats
    sizes: Floats
    squares: float
    low: float
    high: float

    @classmethod
    def of(cls, values: ArrayLike, clusters: Clusters) -> _Table | None:
        """The sums, or None without rows. Rows are sorted first, so that sums do not depend on their order."""
        column = np.asarray(values, dtype=float)
        if not np.isfinite(column).all():
            raise ValueError("a missing value is left out by the caller, not averaged")
        if clusters is not None and len(clusters) != len(column):
            raise ValueError(f"one cluster a row: found {len(column)} rows and {len(clusters)} clusters")
        if not len(column):
            return None
        if clusters is None:
            column, cluster = np.sort(column), np.arange(len(column))
        else:
            cluster = np.unique(np.asarray(clusters, dtype=object), return_inverse=True)[1]
            order = np.lexsort((column, cluster))
            column, cluster = column[order], cluster[order]
        sums, sizes = (np.bincount(cluster, weights).astype(np.float64) for weights in (column, None))
        return cls(sums, sizes, float((column**2).sum()), float(column.min()), float(column.max()))

    @property
    def n(self) -> int:
        return int(self.sizes.sum())

    @property
    def topics(self) -> int:
        return len(self.sizes)

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.sizes.sum())
