"""Rates, differences and win rates over prompts that share topics, with intervals that stay honest with few topics.

Twenty prompts about one thing are not twenty independent observations, so every interval here is clustered. Neither
usual way survives the figures that matter most in this project, which are close to 0 or 1: a cluster bootstrap and a
plain cluster-robust error both give an interval of width zero when every response is right. What is used instead:

- Wilson's score interval (Wilson 1927), which stays inside [0, 1] and keeps a width at its ends,
- with the effective sample size n / deff, deff = 1 + (m - 1) * rho, m = sum(m_g^2) / n (Kish 1965, section 8.2),
- rho from the cluster-robust variance, drawn towards 1 with the weight of one topic: rho* = (k * rho + 1) / (k + 1),
  where k = (sum r_g^2)^2 / sum r_g^4 is how many topics the variance estimate rests on. With no event at all k is 0
  and every topic counts once, which is all that is known; with many topics the term disappears,
- and Student's t with one degree of freedom less than there are topics (Korn and Graubard 1998).

Simulated coverage of the nominal 95 % over p in {0.02, 0.2, 0.5, 0.98}, 5 to 200 topics, rho from 0 to 1, equal and
very unequal topics: 0.90 at worst (where Wilson's own discreteness bites: 5 topics, p = 0.02), mostly 0.95 to 0.99;
without the term in rho it falls to 0.83, with a plain cluster-robust error to 0.10. `tests/test_statistics.py` does a
part of it again.

Left out: models with random effects, bootstraps, anything that draws random numbers. Every function is a pure function
of its arguments, and the order of rows does not matter, to the last bit.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit

Floats = NDArray[np.float64]
Verdict = Literal["a better", "b better", "not distinguishable"]


@dataclass(frozen=True)
class Rate:
    """A mean over `n` rows about `topics` topics. `value` is None, and the interval [0, 1], where there are no rows."""

    value: float | None
    n: int
    topics: int
    interval: tuple[float, float]
    missing: int = 0
    """Rows that belong to it and have no value, since something failed."""

    @property
    def bounds(self) -> tuple[float, float]:
        """`worst_case` of it."""
        return worst_case((self.value or 0.0) * self.n, self.n, self.missing)

    def as_json(self) -> dict[str, Any]:
        """`{"value", "n", "topics", "interval": [low, high]}`; with rows missing also `missing` and `bounds`."""
        found = {"value": self.value, "n": self.n, "topics": self.topics, "interval": list(self.interval)}
        return found | ({"missing": self.missing, "bounds": list(self.bounds)} if self.missing else {})


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over rows measured on both. `p_value` is two-sided, against no difference."""

    value: float | None
    n: int
    topics: int
    interval: tuple[float, float]
    p_value: float
    verdict: Verdict

    def as_json(self) -> dict[str, Any]:
        """The fields by name, the interval as a list."""
        return asdict(self) | {"interval": list(self.interval)}


@dataclass(frozen=True)
class WinRate:
    """Head to head, a against b: a tie counts half. `p_value` is two-sided, against 1/2."""

    rate: Rate
    wins: int
    ties: int
    losses: int
    p_value: float
    verdict: Verdict

    def as_json(self) -> dict[str, Any]:
        """The rate's fields beside the counts."""
        counts = {"wins": self.wins, "ties": self.ties, "losses": self.losses}
        return self.rate.as_json() | counts | {"p_value": self.p_value, "verdict": self.verdict}


def worst_case(total: float, n: int, missing: int) -> tuple[float, float]:
    """The mean of `n` rows that add up to `total`, if each of `missing` others were 0, and if each were 1.

    It assumes nothing about why they are missing (Manski 1989, Anatomy of the selection problem).
    """
    rows = n + missing
    return (total / rows, (total + missing) / rows) if rows else (0.0, 1.0)


def rate(
    values: Sequence[float], clusters: Sequence[str] | None = None, *, missing: int = 0, level: float = 0.95
) -> Rate:
    """Mean of values in [0, 1] (yes or no, probabilities, or halves for ties), clustered by `clusters`.

    `clusters` names each row's topic; None makes each row its own. One topic alone says nothing about others, so its
    interval is [0, 1]. Rows that failed are `missing`: in no mean and no interval, but in the rate's worst-case bounds.
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
    """Different texts over all texts. It falls as more is asked, so compare it between equal numbers of texts only.

    No mean over rows: whether a text is a repetition depends on the others. The variance is the delete-one-topic
    jackknife's of the share itself (Efron and Tibshirani 1993, chapter 11), v = (G - 1) / G * sum (s_g - mean s)^2, and
    the interval Wilson's with p (1 - p) / v rows, at most one a text, or one a topic where v is 0.
    """
    if len(texts) != len(clusters):
        raise ValueError(f"one cluster a text: found {len(texts)} texts and {len(clusters)} clusters")
    if not texts:
        return Rate(None, 0, 0, (0.0, 1.0))
    sizes, topics_of = Counter(clusters), defaultdict[str, set[str]](set)
    for text, cluster in zip(texts, clusters, strict=True):
        topics_of[text].add(cluster)
    only_there = Counter(next(iter(topics)) for topics in topics_of.values() if len(topics) == 1)
    n, groups, share = len(texts), len(sizes), len(topics_of) / len(texts)
    if groups < 2:
        return Rate(share, n, groups, (0.0, 1.0))
    without = np.array([(len(topics_of) - only_there[each]) / (n - sizes[each]) for each in sorted(sizes)])
    variance = float((groups - 1) * without.var())
    effective = min(share * (1 - share) / variance, float(n)) if variance > 0 and share < 1 else float(groups)
    t = float(_quantile(level, groups))
    shrink = 1 + t**2 / effective
    centre = (share + t**2 / (2 * effective)) / shrink
    reach = t / shrink * math.sqrt(share * (1 - share) / effective + (t / (2 * effective)) ** 2)
    high = 1.0 if share == 1 else min(max(centre + reach, share), 1.0)
    return Rate(share, n, groups, (max(min(centre - reach, share), 0.0), high))


def mean(values: Sequence[float], clusters: Sequence[str] | None = None, *, level: float = 0.95) -> Rate:
    """Mean of values without bounds (a length in words): mean ± t * cluster-robust error, t with topics - 1 degrees.

    Raises ValueError for rows of fewer than two clusters: nothing bounds such an interval.
    """
    table = _Table.of(values, clusters)
    if table is None or table.topics < 2:
        raise ValueError("an interval of an unbounded mean needs rows of at least two clusters")
    reach = float(_quantile(level, table.topics)) * table.error
    return Rate(table.mean, table.n, table.topics, (table.mean - reach, table.mean + reach))


def standard_error(values: Sequence[float], clusters: Sequence[str] | None = None) -> float:
    """Cluster-robust standard error of the mean; with one row a cluster, the sample deviation over sqrt(n).

    sqrt(G / (G - 1) * sum r_g^2) / n, r_g the sum of a cluster's residuals (Liang and Zeger 1986; Miller 2024,
    arXiv 2411.00640, section 2.2, has the same without the factor for few clusters). Needs two clusters.
    """
    table = _Table.of(values, clusters)
    if table is None or table.topics < 2:
        raise ValueError("a standard error needs rows of at least two clusters")
    return table.error


def paired_difference(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[str] | None = None, *, level: float = 0.95
) -> Difference:
    """a - b, row by row, for values in [0, 1] measured on the same prompts.

    The difference lies in [-1, 1]; (d + 1) / 2 lies in [0, 1] and gets the interval of `rate`. Pairing takes out what
    both share, so that two checkpoints are told apart by the prompts on which they differ. Equal columns are no
    difference with an interval of little width, never a division by zero.
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
    return Difference(
        difference,
        table.n,
        table.topics,
        (float(2 * low - 1), float(2 * high - 1)),
        p_value,
        verdict(difference, p_value, level),
    )


def win_rate(
    outcomes: Sequence[float], clusters: Sequence[str] | None = None, *, missing: int = 0, level: float = 0.95
) -> WinRate:
    """Share of comparisons that a won, from outcomes 1 (a won), 0 (b won) and anything between (a tie, 1/2).

    Probabilities that a is better are outcomes too; their mean is then AlpacaEval 2's win rate.
    """
    table = _Table.of(outcomes, clusters)
    estimate = rate(outcomes, clusters, missing=missing, level=level)
    wins, losses = (sum(1 for value in outcomes if value == end) for end in (1, 0))
    p_value = 1.0 if table is None else _score_p_value(table, 0.5)
    lead = 0.0 if estimate.value is None else estimate.value - 0.5
    return WinRate(estimate, wins, len(outcomes) - wins - losses, losses, p_value, verdict(lead, p_value, level))


def outcome(log_odds_ab: float, log_odds_ba: float, tie_below: float = 0.0) -> float:
    """1 if a won, 0 if b won, 1/2 for a tie, from the log-odds (nats) that a is better in each order of showing.

    Their mean cancels a judge's additive preference for a position; nearer to even than `tie_below` is a tie.
    """
    lead = (log_odds_ab + log_odds_ba) / 2
    return 0.5 if abs(lead) <= tie_below else float(lead > 0)


def verdict(difference: float | None, p_value: float, level: float = 0.95) -> Verdict:
    """Which of two is better, or that the data do not say."""
    if not difference or p_value > 1 - level:
        return "not distinguishable"
    return "a better" if difference > 0 else "b better"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given: several comparisons, one error rate."""
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
    n = effective_size(sums, squares, sizes)
    t = _quantile(level, sizes.size)
    shrink = 1 + t**2 / n
    centre = (value + t**2 / (2 * n)) / shrink
    reach = t / shrink * np.sqrt(value * (1 - value) / n + (t / (2 * n)) ** 2)
    # The ends are exact at 0 and 1, where rounding would leave 1e-19; the mean itself is always inside.
    low = np.where(value <= 0, 0.0, np.clip(centre - reach, 0.0, value))
    high = np.where(value >= 1, 1.0, np.clip(centre + reach, value, 1.0))
    return low, high


def effective_size(sums: ArrayLike, squares: ArrayLike, sizes: ArrayLike) -> Floats:
    """How many independent yes-or-no answers say as much: p (1 - p) over the variance of the clustered mean.

    Shapes as in `score_interval`. Values between 0 and 1 vary less than yes or no and count for more.
    """
    sums, squares, sizes = (np.asarray(x, dtype=float) for x in (sums, squares, sizes))
    n, groups = sizes.sum(), sizes.size
    value = sums.sum(-1) / n
    binary = value * (1 - value)
    scatter = np.maximum(squares - n * value**2, 0.0)
    scatter = np.where(scatter < 1e-12 * n, 0.0, scatter)  # equal values: what is left is rounding
    residuals = sums - sizes * value[..., None]
    second, fourth = (residuals**2).sum(-1), (residuals**4).sum(-1)
    kish = (sizes**2).sum() / n
    known = (scatter > 0) & (fourth > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        evidence = np.where(known, second**2 / fourth, 0.0)
        deff = groups / (groups - 1) * second / scatter if groups > 1 else np.ones_like(value)
        likeness = np.clip((deff - 1) / (kish - 1), 0.0, 1.0) if kish > 1 else np.zeros_like(value)
    likeness = (np.where(known, likeness, 0.0) * evidence + 1) / (evidence + 1)
    # One pseudo-row with the variance of yes or no: equal values (all ties) do not make the interval vanish.
    variance = (scatter + binary) / (n + 1)
    spread = np.where(binary > 0, binary / np.where(variance > 0, variance, 1.0), 1.0)
    independent: Floats = n / (1 + (kish - 1) * likeness) * spread
    return independent


def _quantile(level: float, clusters: int) -> np.float64:
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
    def of(cls, values: ArrayLike, clusters: Sequence[str] | None) -> _Table | None:
        """None for no rows. Rows are sorted first: sums then do not depend on their order."""
        column = np.asarray(values, dtype=float)
        if not np.isfinite(column).all():
            raise ValueError("a missing value is left out by the caller, not averaged")
        if clusters is not None and len(clusters) != len(column):
            raise ValueError(f"one cluster a row: found {len(column)} rows and {len(clusters)} clusters")
        if not len(column):
            return None
        if clusters is None:
            column, groups = np.sort(column), np.arange(len(column))
        else:
            groups = np.unique(np.asarray(clusters, dtype=object), return_inverse=True)[1]
            order = np.lexsort((column, groups))
            column, groups = column[order], groups[order]
        sums, sizes = (np.bincount(groups, weights).astype(np.float64) for weights in (column, None))
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

    @property
    def error(self) -> float:
        residuals = self.sums - self.sizes * self.mean
        return float(np.sqrt(self.topics / (self.topics - 1) * (residuals**2).sum()) / self.n)
