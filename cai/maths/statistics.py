"""Rates, differences and win rates over prompts that share topics, with intervals that stay honest with few topics.

Twenty prompts about one topic are not twenty independent observations, so every interval here is clustered. The two
usual methods fail for rates close to 0 or 1, the most common ones in this project: a cluster bootstrap and a plain
cluster-robust error both give an interval of width zero when every response is right. The method here is

- Wilson's score interval (Wilson 1927), which stays inside [0, 1] and keeps a width at its ends,
- with the effective sample size n / deff, deff = 1 + (m - 1) * rho, m = sum(m_g^2) / n (Kish 1965, section 8.2),
- rho from the cluster-robust variance sum(r_g^2 / (1 - m_g / n)), whose factors undo that a large topic draws the mean
  towards itself (CR2: Bell and McCaffrey 2002),
- rho shrunk towards 1, rho* = (k * rho + u) / (k + u). k = (sum r_g^2)^2 / sum r_g^4 is the number of topics that the
  variance estimate rests on. u is the number of topics over the effective number, n^2 / sum m_g^2: 1 for topics of one
  size. Without any event k is 0 and every topic counts once; with many topics the shrinkage disappears,
- and Student's t with the degrees of freedom of that variance if rows of one topic correlate by rho* (Satterthwaite's,
  as in Imbens and Kolesar 2016): one less than there are topics of one size, and fewer where some topics are large.

Simulated coverage of the nominal 95 %, over 5 to 200 topics, rho from 0 to 1, topics of one size, of log-normal sizes
with sigma up to 2, and one of 100 rows among topics of two:

- rates with ten effective topics or more: at worst 0.94 for p = 0.2 and 0.5, and 0.926 for p = 0.02, where Wilson's own
  discreteness bites,
- rates with fewer topics: 0.93, but 0.90 for 5 topics of one size at p = 0.02,
- differences: 0.95 where half of the rows differ; 0.92 where 6 % of them do and topics agree within themselves. Where
  2 % of the rows differ, all in one direction, 0.58 with 40 such topics, since often no row of the sample differs and
  the interval around 0 is narrow,
- means of values without bounds: 0.92, but 0.90 where the values are skewed.

Where few topics hold most rows the interval errs on the wide side, by up to several times where rho is small, since so
few topics cannot show that it is. With topics - 1 degrees of freedom, without CR2 and with u = 1 coverage falls to
0.80, without shrinking rho to 0.83, with a plain cluster-robust error to 0.10. `tests/maths/test_statistics.py` repeats
a part of the simulation, and holds 0.93 for rates and differences and 0.90 for skewed values, less the error of the
simulation.

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
    interval is Wilson's with p (1 - p) / v rows, at most one a text, or with one row a topic where v is 0. Its degrees
    of freedom are those of topics whose texts repeat each other (rho = 1).
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
    degrees = degrees_of_freedom(np.array(sorted(sizes.values()), dtype=float), np.ones(()))
    low, high = _wilson_interval(np.float64(share), n_effective, _t_quantile(level, degrees))
    return Rate(share, n, n_topics, (float(low), float(high)))


def mean(values: Sequence[float], clusters: Clusters = None, *, level: float = 0.95) -> Rate:
    """Mean of values without bounds (a length in words): mean ± t * cluster-robust error.

    The standard error is sqrt(sum r_g^2 / (1 - m_g / n)) / n, r_g the sum of a cluster's residuals and m_g its rows
    (Bell and McCaffrey 2002; Miller 2024, arXiv 2411.00640, section 2.2, has it without the factor). The degrees of
    freedom of t are those of `rate`. Raises ValueError for rows of fewer than two clusters: nothing bounds such an
    interval.
    """
    table = _Table.of(values, clusters)
    if table is None or table.topics < 2:
        raise ValueError("an interval of an unbounded mean needs rows of at least two clusters")
    residuals = _residuals(table.sums, table.sizes)
    standard_error = float(np.sqrt((residuals**2).sum())) / table.n
    rho = correlation_within_topics(table.sums, table.squares, table.sizes)
    half_width = float(_t_quantile(level, degrees_of_freedom(table.sizes, rho))) * standard_error
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
    rho = correlation_within_topics(sums, squares, sizes)
    t = _t_quantile(level, degrees_of_freedom(sizes, rho))
    return _wilson_interval(value, effective_size(sums, squares, sizes, rho), t)


def _wilson_interval(value: ArrayLike, n: ArrayLike, t: Floats) -> tuple[Floats, Floats]:
    """Wilson's score interval of shares `value` of `n` rows, with the quantile t in place of the normal one."""
    value, n = np.asarray(value, dtype=float), np.asarray(n, dtype=float)
    shrinkage = 1 + t**2 / n
    centre = (value + t**2 / (2 * n)) / shrinkage
    half_width = t / shrinkage * np.sqrt(value * (1 - value) / n + (t / (2 * n)) ** 2)
    # Rounding would leave 1e-19 where an end is exactly 0 or 1; the mean always lies inside.
    low = np.where(value <= 0, 0.0, np.clip(centre - half_width, 0.0, value))
    high = np.where(value >= 1, 1.0, np.clip(centre + half_width, value, 1.0))
    return low, high


def correlation_within_topics(sums: ArrayLike, squares: ArrayLike, sizes: ArrayLike) -> Floats:
    """rho*: how much rows of one topic correlate, 0 to 1, shrunk towards 1 where few topics tell. Shapes as above."""
    sums, sizes = np.asarray(sums, dtype=float), np.asarray(sizes, dtype=float)
    n = sizes.sum()
    scatter = _scatter(sums, squares, n)
    residuals = _residuals(sums, sizes)
    second_moment, fourth_moment = (residuals**2).sum(-1), (residuals**4).sum(-1)
    kish_size = (sizes**2).sum() / n
    is_estimable = (scatter > 0) & (fourth_moment > 0) & (kish_size > 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        k = np.where(is_estimable, second_moment**2 / fourth_moment, 0.0)
        rho = np.where(is_estimable, np.clip((second_moment / scatter - 1) / (kish_size - 1), 0.0, 1.0), 0.0)
    unevenness = len(sizes) * (sizes**2).sum() / n**2  # topics over effective topics
    shrunk: Floats = (k * rho + unevenness) / (k + unevenness)
    return shrunk


def effective_size(sums: ArrayLike, squares: ArrayLike, sizes: ArrayLike, rho: Floats) -> Floats:
    """Number of independent yes-or-no answers with the same variance: p (1 - p) over that of the clustered mean.

    Shapes as in `score_interval`, rho (...). Values between 0 and 1 vary less than yes or no, so each counts for more
    than one.
    """
    sums, sizes = np.asarray(sums, dtype=float), np.asarray(sizes, dtype=float)
    n = sizes.sum()
    value = sums.sum(-1) / n
    binary = value * (1 - value)
    # One pseudo-row with the variance of yes or no keeps the interval of equal values (all ties) from vanishing.
    variance = (_scatter(sums, squares, n) + binary) / (n + 1)
    variance_ratio = np.where(binary > 0, binary / np.where(variance > 0, variance, 1.0), 1.0)
    n_effective: Floats = n / (1 + ((sizes**2).sum() / n - 1) * rho) * variance_ratio
    return n_effective


def degrees_of_freedom(sizes: Floats, rho: Floats) -> Floats:
    """Satterthwaite's degrees of freedom, at least 1, of the CR2 variance of a mean; sizes (G,), rho (...) -> (...).

    They are (sum C_gg)^2 / sum C_gh^2, C the covariance (G, G) of the clusters' corrected residual sums where rows of a
    cluster correlate by rho (Imbens and Kolesar 2016, equation 13). With shares h_g = m_g / n, variances
    v_g = m_g (1 + (m_g - 1) rho) of a cluster's sum and V = sum v_g, C_gh = (v_g [g = h] + u_gh) /
    sqrt((1 - h_g) (1 - h_h)), u_gh = h_g h_h V - h_g v_h - h_h v_g.

    The paper writes (sum lambda)^2 / sum lambda^2 with the eigenvalues lambda of C = G' Omega G: the sum of lambda is
    that of `c_diagonal`, the sum of lambda^2 is `sum_of_c_squared`. The sum over u_gh^2 needs three sums over
    clusters, so that no (G, G) matrix is built.
    """
    shares = sizes / sizes.sum()
    cr2_factors = 1 / (1 - shares)
    variances = sizes * (1 + (sizes - 1) * np.asarray(rho, dtype=float)[..., None])  # v_g
    total_variance = variances.sum(-1)  # V
    u_diagonal = cr2_factors * (shares**2 * total_variance[..., None] - 2 * shares * variances)  # u_gg / (1 - h_g)
    c_diagonal = cr2_factors * variances + u_diagonal  # C_gg
    sum_h_h = (cr2_factors * shares**2).sum(-1)
    sum_h_v = (cr2_factors * shares * variances).sum(-1)
    sum_v_v = (cr2_factors * variances**2).sum(-1)
    sum_of_u_squared = (
        (total_variance * sum_h_h) ** 2
        - 4 * total_variance * sum_h_h * sum_h_v
        + 2 * sum_h_h * sum_v_v
        + 2 * sum_h_v**2
    )  # over g and h
    sum_of_c_squared = sum_of_u_squared + (c_diagonal**2 - u_diagonal**2).sum(-1)  # off the diagonal C_gh is u_gh's
    degrees: Floats = np.maximum(c_diagonal.sum(-1) ** 2 / sum_of_c_squared, 1.0)
    return degrees


def _residuals(sums: Floats, sizes: Floats) -> Floats:
    """Each cluster's sum of residuals over sqrt(1 - m_g / n), which the mean was fitted to; shapes as `sums`."""
    n = sizes.sum()
    residuals: Floats = (sums - sizes * (sums.sum(-1) / n)[..., None]) / np.sqrt(1 - sizes / n)
    return residuals


def _scatter(sums: Floats, squares: ArrayLike, n: np.float64) -> Floats:
    """Sum of squared deviations from the mean, (...)."""
    value = sums.sum(-1) / n
    scatter = np.maximum(np.asarray(squares, dtype=np.float64) - n * value**2, 0.0)
    without_rounding: Floats = np.where(scatter < 1e-12 * n, 0.0, scatter)  # equal values leave only rounding errors
    return without_rounding


def _t_quantile(level: float, degrees: Floats) -> Floats:
    return np.asarray(stdtrit(degrees, (1 + level) / 2), dtype=np.float64)


def _score_p_value(table: _Table, null: float) -> float:
    """Two-sided p-value of the score test whose inversion the interval is."""
    if table.topics < 2:
        return 1.0
    rho = correlation_within_topics(table.sums, table.squares, table.sizes)
    n = effective_size(table.sums, table.squares, table.sizes, rho)
    statistic = abs(table.mean - null) / np.sqrt(null * (1 - null) / n)
    return float(2 * stdtr(degrees_of_freedom(table.sizes, rho), -statistic))


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
